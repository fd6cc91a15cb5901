"""Dispatch modes: what travels between attention ranks and FFN ranks, and the maths at both ends."""

from __future__ import annotations

import torch

from megatron_disagmoe.transport.dispatch.base import CombineState, Dispatcher, DispatchSizes, ExpertInput
from megatron_disagmoe.transport.dispatch.gradients import gradient_spec
from megatron_disagmoe.transport.dispatch.node import NodeChannels, NodeExchange, TransportExchange
from megatron_disagmoe.transport.dispatch.per_expert import PerExpertDispatcher
from megatron_disagmoe.transport.dispatch.per_node import PerNodeDispatcher
from megatron_disagmoe.transport.dispatch.per_rank import PerRankDispatcher

__all__ = [
    "DISPATCH_MODES",
    "CombineState",
    "DispatchSizes",
    "Dispatcher",
    "ExpertInput",
    "NodeChannels",
    "NodeExchange",
    "TransportExchange",
    "create_dispatcher",
    "gradient_spec",
]

#: Names that `create_dispatcher` knows.
DISPATCH_MODES = (PerExpertDispatcher.mode, PerRankDispatcher.mode, PerNodeDispatcher.mode)


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
    ranks_per_node: int = 1,
) -> Dispatcher:
    """Create the dispatcher of ``mode``; the arguments are those of `DispatchSizes`.

    ``per-node`` also needs ``ranks_per_node``: FFN ranks ``n`` with equal ``n // ranks_per_node`` share a node.

    Raises:
        ValueError: for an unknown mode or sizes that do not fit together.
    """
    if mode not in DISPATCH_MODES:
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
    if mode == PerNodeDispatcher.mode:
        return PerNodeDispatcher(sizes, ranks_per_node=ranks_per_node)
    return PerRankDispatcher(sizes) if mode == PerRankDispatcher.mode else PerExpertDispatcher(sizes)
