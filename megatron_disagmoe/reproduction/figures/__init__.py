"""The paper's figures, one module each: cells to run, rows beside the paper's, the picture."""
