"""Dispatch modes: what travels between attention ranks and FFN ranks, and the maths at both ends."""

from __future__ import annotations

import torch

from megatron_disagmoe.transport.dispatch.base import (
    CombineState,
    Dispatcher,
    DispatchSizes,
    ExpertInput,
    gradient_spec,
)
from megatron_disagmoe.transport.dispatch.per_expert import PerExpertDispatcher
from megatron_disagmoe.transport.dispatch.per_rank import PerRankDispatcher

__all__ = [
    "DISPATCH_MODES",
    "CombineState",
    "DispatchSizes",
    "Dispatcher",
    "ExpertInput",
    "create_dispatcher",
    "gradient_spec",
]

_MODES: dict[str, type[Dispatcher]] = {
    PerExpertDispatcher.mode: PerExpertDispatcher,
    PerRankDispatcher.mode: PerRankDispatcher,
}
#: Names that `create_dispatcher` knows.
DISPATCH_MODES = tuple(_MODES)


def create_dispatcher(
    mode: str,
    *,
    num_tokens: int,
    hidden_size: int,
    num_experts: int,
    topk: int,
    num_attention_ranks: int,
    num_ffn_ranks: int,
    dtype: torch.dtype,
    probs_dtype: torch.dtype,
) -> Dispatcher:
    """Create the dispatcher of ``mode``; the arguments are those of `DispatchSizes`.

    Raises:
        ValueError: for an unknown mode or sizes that do not fit together.
    """
    if mode not in _MODES:
        raise ValueError(f"unknown dispatch mode {mode!r}; choose from {', '.join(DISPATCH_MODES)}")
    sizes = DispatchSizes(
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        num_experts=num_experts,
        topk=topk,
        num_attention_ranks=num_attention_ranks,
        num_ffn_ranks=num_ffn_ranks,
        dtype=dtype,
        probs_dtype=probs_dtype,
    )
    return _MODES[mode](sizes)
