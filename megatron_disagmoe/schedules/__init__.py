"""Pipeline schedules as data: built, lowered, verified, written to text. Pure Python: no torch, no Megatron."""
