"""Model, cluster and run files. Installed as ``megatron_disagmoe.configs``; found by ``megatron_disagmoe.files``."""
