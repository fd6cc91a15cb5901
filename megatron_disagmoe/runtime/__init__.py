"""Runs a schedule on this rank: the interpreter, the links to other ranks, and what a stage does with autograd."""
