"""Beyond the paper: where AF-pipe with every lever wins against Megatron-1F1B and a fair rival, and where not."""
