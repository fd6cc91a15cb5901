"""Checkpoints with vanilla's keys."""

from __future__ import annotations


def install() -> None:
    """Hook into Megatron's checkpointing."""
