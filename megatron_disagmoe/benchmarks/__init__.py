"""What `disagmoe bench` measures, one module each."""
