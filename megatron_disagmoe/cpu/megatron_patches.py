"""Replacements inside Megatron that a machine without CUDA needs; the reasons are in ``seam_records``."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from megatron_disagmoe import megatron_seams

ENTRIES = (
    "megatron.training.initialize:initialize_megatron",
    "megatron.training:initialize_megatron",
    "megatron.training.training:initialize_megatron",
)


def install() -> None:
    """Apply all of them; ``SeamGone`` where one of the symbols is not there or takes other parameters."""
    for entry in ENTRIES:
        megatron_seams.wrap(entry, lambda original: functools.partial(original, allow_no_cuda=True))
    megatron_seams.patch("megatron.core.tensor_parallel.random:_get_cuda_rng_state", _get_rng_state)
    megatron_seams.patch("megatron.core.tensor_parallel.random:_set_cuda_rng_state", _set_rng_state)
    megatron_seams.wrap("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu", _with_numpy_splits)
    megatron_seams.wrap(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue", _by_fork
    )
    _silence_what_holds_for_gpus_only()


def _get_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _with_numpy_splits(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return tensor

    return maybe_move_tensor_to_cpu


def _by_fork(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "fork") -> Any:
        return original("fork")

    return get_write_results_queue


def _silence_what_holds_for_gpus_only() -> None:
    """Two warnings say, many times a step, what is meant to be so here: one generator, and no pinned memory."""
    message = "CPU RNG state changed within GPU RNG context"
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(lambda record: record.getMessage() != message)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
