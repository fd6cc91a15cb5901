"""What a schedule costs: stage times, the event engine, lower bounds. Pure Python: no torch, no Megatron."""
