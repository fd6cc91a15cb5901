"""One optimizer step over A and F together: one gradient norm, one clip, one found-inf, one count of zeros.

Every group computes its own share with Megatron's code (all ranks of a group then agree on it); one collective over
the world combines the shares, each entered once, by the group's first rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_disagmoe import parallel_state


def unified(original: Callable[..., Any]) -> Callable[..., Any]:
    """``get_megatron_optimizer`` whose optimizer steps A and F as one."""

    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        unify(optimizer)
        return optimizer

    return get_megatron_optimizer


def unify(optimizer: Any) -> None:
    """Combine this optimizer's global decisions with the other roles'."""
    if not isinstance(optimizer, ChainedOptimizer):
        raise ValueError(f"--optimizer {type(optimizer).__name__} is not supported with --af-pipe; use adam or sgd")
    norm_of_group, zeros_of_group = optimizer.get_grad_norm, optimizer.count_zeros
    optimizer.get_grad_norm = lambda: norm_over_groups(norm_of_group() or 0.0)
    optimizer.count_zeros = lambda: sum_over_groups(zeros_of_group() or 0.0)
    scalers = [
        scaler for part in optimizer.chained_optimizers if (scaler := getattr(part, "grad_scaler", None)) is not None
    ]
    if scalers:
        _share_found_inf(optimizer, scalers)


def sum_over_groups(value: float) -> float:
    """The sum over all groups of a number that each group's ranks agree on; collective over the world."""
    mine = value if parallel_state.state().speaks_for_group else 0.0
    total = torch.tensor([mine], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return float(total.item())


def norm_over_groups(norm: float) -> float:
    """The norm of everything, from the norm of what each group holds; collective over the world."""
    return math.sqrt(sum_over_groups(norm**2))


def _share_found_inf(optimizer: ChainedOptimizer, scalers: list[Any]) -> None:
    """Skip a step on every rank if any found an overflow, and let every loss scale follow.

    Megatron's parts (dense and expert parameters) each update the scale on their own finding. Roles have
    other parts, so the findings are put together first: one reduction a step, whatever a rank holds.
    """
    prepare_own = optimizer.prepare_grads
    updates = [scaler.update for scaler in scalers]
    for scaler in scalers:
        scaler.update = lambda found_inf: None  # until everyone's finding is known

    def prepare_grads() -> bool:
        found = torch.tensor([float(prepare_own())], device=torch.cuda.current_device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        found_inf = bool(found.item())
        for update in updates:
            update(found_inf)
        return found_inf

    optimizer.prepare_grads = prepare_grads
