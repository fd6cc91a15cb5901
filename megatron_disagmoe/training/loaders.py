"""Data loaders of FFN ranks: built, because global rank 0 may be one and decides for all whether there is anything to
train on, but never drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.training import get_args

from megatron_disagmoe import parallel_state


def without_workers_on_ffn_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    """``build_pretraining_data_loader`` whose loaders start no processes where no batch is drawn."""

    def build_pretraining_data_loader(*args: Any, **kwargs: Any) -> Any:
        if parallel_state.state().is_attention:
            return original(*args, **kwargs)
        options = get_args()
        num_workers, options.num_workers = options.num_workers, 0
        try:
            return original(*args, **kwargs)
        finally:
            options.num_workers = num_workers

    return build_pretraining_data_loader
