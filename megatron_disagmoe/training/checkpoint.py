"""Checkpoints that plain Megatron writes and reads too.

Keys need no help: each rank's model has Megatron's modules under Megatron's names and global layer numbers. What does
is the state of which Megatron expects one copy in the world, or equal copies on all ranks:

* random numbers: one entry for each group of ranks that draws alike; the first attention group's has Megatron's key;
* the common part of the optimizer's state, which rank 0 (an FFN rank) writes for everyone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_disagmoe import megatron_seams, parallel_state
from megatron_disagmoe.checkpoints import optimizer_state
from megatron_disagmoe.parallel_state import AFParallelState
from megatron_disagmoe.training import checkpoint_loading

_CHECKPOINTING = "megatron.training.checkpointing"
_TRAINING = "megatron.training.training"


def install() -> None:
    """Hook into Megatron's checkpointing."""
    megatron_seams.wrap(f"{_CHECKPOINTING}:get_rng_state", _kept_apart_by_role)
    megatron_seams.wrap(f"{_CHECKPOINTING}:generate_state_dict", _with_common_state_of_both_roles)
    megatron_seams.wrap(f"{_TRAINING}:get_megatron_optimizer", _saving_without_parameters)
    megatron_seams.wrap(f"{_TRAINING}:load_checkpoint", checkpoint_loading.checked)


def rng_key(state: AFParallelState) -> tuple[str, int]:
    """Prefix of the key under which this rank's random numbers are saved, and its place among those that share it.

    Data-parallel attention ranks draw alike, as in Megatron; FFN ranks are seeded by their experts.
    """
    role = state.role
    if not state.is_attention:
        return f"af.{role.group}.n{role.index}.", role.replica
    copy = role.replica * state.topology.attention_ranks + role.index
    return ("" if state.is_first else f"af.{role.group}."), copy


def _kept_apart_by_role(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_rng_state(*args: Any, **options: Any) -> Any:
        sharded = original(*args, **options)
        prefix, copy = rng_key(parallel_state.state())
        return dataclasses.replace(sharded, key=f"{prefix}{sharded.key}", replica_id=copy)

    return get_rng_state


def _with_common_state_of_both_roles(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_state_dict(*args: Any, **options: Any) -> dict[str, Any]:
        state: dict[str, Any] = original(*args, **options)
        if "optimizer" in state:
            optimizer_state.share_step(state["optimizer"])
            optimizer_state.index_main_parameters(state["optimizer"])
        return state

    return generate_state_dict


def _saving_without_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_optimizer(*args: Any, **options: Any) -> Any:
        optimizer = original(*args, **options)
        for part in optimizer.chained_optimizers:
            if isinstance(part, DistributedOptimizer):
                if not part.buffers:
                    _save_hyperparameters_only(part)
            elif not part.get_parameters():
                _save_in_silence(part)
        return optimizer

    return get_megatron_optimizer


def _save_hyperparameters_only(part: DistributedOptimizer) -> None:
    """Give an optimizer of the kind of parameters that this role has none of a state without a step of its own.

    Megatron's asserts that there is one; ``share_step`` adds that of the parameters there are.
    """

    def state_dict() -> dict[str, Any]:
        groups = part.optimizer.state_dict()["param_groups"]
        without = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        state: dict[str, Any] = {"optimizer": {"param_groups": without}}
        if part.grad_scaler is not None:
            state["grad_scaler"] = part.grad_scaler.state_dict()
        return state

    def load_state_dict(state: dict[str, Any]) -> None:
        if part.grad_scaler is not None and "grad_scaler" in state:
            part.grad_scaler.load_state_dict(state["grad_scaler"])

    part.state_dict, part.load_state_dict = state_dict, load_state_dict


def _save_in_silence(part: Any) -> None:
    """Keep Megatron from warning at every save that an optimizer without parameters has none in the model."""
    own = part.sharded_state_dict
    warns = logging.getLogger("megatron.core.dist_checkpointing.optimizer")

    def sharded_state_dict(*args: Any, **options: Any) -> Any:
        warns.disabled = True
        try:
            return own(*args, **options)
        finally:
            warns.disabled = False

    part.sharded_state_dict = sharded_state_dict
