"""Which GPUs do what: models, clusters, costs, memory, search, plans. Pure Python: no torch, no Megatron."""
