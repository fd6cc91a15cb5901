"""Builders of schedules: which group does what in which order. Compute actions only; no torch, no Megatron."""

from megatron_disagmoe.builders.front import KINDS, NOMINAL_COSTS, build
from megatron_disagmoe.builders.search import least_live

__all__ = ["KINDS", "NOMINAL_COSTS", "build", "least_live"]
