"""Checkpoints as data on disk: what is in one, how two differ, whether one fits a run. Pure torch, no Megatron."""
