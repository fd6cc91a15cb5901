"""The seams to ``megatron.training``: flags, process groups, model, schedule, optimizer, checkpoints, logs."""
