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
from megatron.core.optimizer.optimizer import ChainedOptimizer, MixedPrecisionOptimizer

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
    optimizer.get_grad_norm = lambda: math.sqrt(sum_over_groups((norm_of_group() or 0.0) ** 2))
    optimizer.count_zeros = lambda: sum_over_groups(zeros_of_group() or 0.0)
    # All roles must agree before a loss scale is updated, so each takes part in equally many reductions.
    scaled = [
        part
        for part in optimizer.chained_optimizers
        if isinstance(part, MixedPrecisionOptimizer) and part.grad_scaler is not None
    ]
    if scaled:
        assert len(scaled) == len(optimizer.chained_optimizers) == 1, "one optimizer with a loss scale per role"
        _share_found_inf(scaled[0])


def sum_over_groups(value: float) -> float:
    """The sum over all groups of a number that each group's ranks agree on."""
    mine = value if parallel_state.state().speaks_for_group else 0.0
    total = torch.tensor([mine], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return float(total.item())


def _share_found_inf(part: MixedPrecisionOptimizer) -> None:
    check_own = part._unscale_main_grads_and_check_for_nan

    def unscale_and_check() -> bool:
        found = torch.tensor([float(check_own())], device=torch.cuda.current_device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found.item())

    part._unscale_main_grads_and_check_for_nan = unscale_and_check
