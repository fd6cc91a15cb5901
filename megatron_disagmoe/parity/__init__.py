"""The proof that AF-pipe computes what Megatron computes: both train the same steps, and the numbers are compared."""
