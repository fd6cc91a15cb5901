"""What a dispatch mode is: differentiable local maths at the two ends of the M2N and N2M edges.

Shape legend: ``T`` tokens of one attention rank's micro-batch, ``h`` hidden size, ``E`` experts, ``k`` experts a
token, ``M`` attention ranks and ``N`` FFN ranks of the two groups, ``r`` rows of one message, ``R`` rows that an
FFN rank's experts compute on. Expert ``e`` lives on FFN rank ``e // (E / N)``.

Nothing here communicates: messages go out of ``dispatch`` and ``expert_output``, and come in to ``expert_input``
and ``combine``; whoever moves them also moves the gradients of their differentiable sections back, in messages of
the matching gradient spec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_disagmoe.transport.base import Message, MessageSpec
from megatron_disagmoe.transport.dispatch.gradients import gradient_spec
from megatron_disagmoe.transport.dispatch.node import NodeExchange


@dataclass(frozen=True)
class DispatchSizes:
    """Sizes that both sides know; every message spec follows from them.

    Attributes:
        num_tokens: most tokens one attention rank has in a micro-batch, ``T``.
        hidden_size: ``h``.
        num_experts: ``E``; a multiple of ``num_ffn_ranks``.
        topk: ``k``.
        num_attention_ranks: ``M``.
        num_ffn_ranks: ``N``.
        dtype: of hidden states.
        probs_dtype: of routing probabilities (the router's).
    """

    num_tokens: int
    hidden_size: int
    num_experts: int
    topk: int
    num_attention_ranks: int
    num_ffn_ranks: int
    dtype: torch.dtype
    probs_dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("num_tokens", "hidden_size", "num_experts", "topk", "num_attention_ranks", "num_ffn_ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_experts % self.num_ffn_ranks:
            raise ValueError(
                f"{self.num_experts} experts do not divide over {self.num_ffn_ranks} FFN ranks; "
                f"choose --af-ffn-ranks among the divisors of --num-experts"
            )
        if self.topk > self.num_experts:
            raise ValueError(f"top-{self.topk} of {self.num_experts} experts: --moe-router-topk is too large")

    @property
    def num_local_experts(self) -> int:
        """Experts of one FFN rank, ``E / N``."""
        return self.num_experts // self.num_ffn_ranks

    @property
    def max_pairs(self) -> int:
        """Most (token, expert) pairs between one attention and one FFN rank, dropless: ``T * min(k, E/N)``."""
        return self.num_tokens * min(self.topk, self.num_local_experts)


class ExpertInput(NamedTuple):
    """What an FFN rank's experts compute on.

    Attributes:
        tokens: ``[R, h]``, ordered by local expert, then by attention rank, then by token (``per-node``: by the rank
            of the node that forwarded it, then by token).
        tokens_per_expert: int64 ``[E/N]`` on the host.
        probs: ``[R]``.
        state: for `Dispatcher.expert_output`.
    """

    tokens: torch.Tensor
    tokens_per_expert: torch.Tensor
    probs: torch.Tensor
    state: Any


@dataclass(frozen=True)
class CombineState:
    """What an attention rank needs to put a micro-batch back together; the lane carries it to the next stage.

    Attributes:
        token_of_row: int64 ``[rows]``, the token behind each row sent, all FFN ranks in order; None where the rows
            are the tokens.
        num_tokens: ``T``.
    """

    token_of_row: torch.Tensor | None
    num_tokens: int


class Dispatcher(ABC):
    """One dispatch mode for given sizes. Holds no state between micro-batches."""

    #: Name in ``--af-dispatch``.
    mode: str

    def __init__(self, sizes: DispatchSizes) -> None:
        self.sizes = sizes

    @abstractmethod
    def m2n_spec(self) -> MessageSpec:
        """What one attention rank sends to one FFN rank."""

    @abstractmethod
    def n2m_spec(self) -> MessageSpec:
        """What one FFN rank sends back to one attention rank."""

    def m2n_grad_spec(self) -> MessageSpec:
        """Gradients of M2N's differentiable sections, with the rows of the message they belong to."""
        return gradient_spec(self.m2n_spec())

    def n2m_grad_spec(self) -> MessageSpec:
        """Gradients of N2M's differentiable sections, with the rows of the message they belong to."""
        return gradient_spec(self.n2m_spec())

    @abstractmethod
    def dispatch(
        self, hidden: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[list[Message], CombineState]:
        """Attention side: one message per FFN rank, and the state that `combine` needs.

        Args:
            hidden: ``[T, h]``.
            probs: ``[T, E]``.
            routing_map: bool ``[T, E]``, at most k experts a token.

        Raises:
            ValueError: where the tokens are more than ``num_tokens``.
        """

    @abstractmethod
    def combine(self, received: list[Message], state: CombineState) -> torch.Tensor:
        """Attention side: ``[T, h]`` from one N2M message per FFN rank."""

    #: FFN ranks that exchange rows among themselves within a stage; 1 where none do.
    node_size: int = 1

    @abstractmethod
    def expert_input(self, received: list[Message], exchange: NodeExchange | None = None) -> ExpertInput:
        """FFN side: what the experts compute on, from one M2N message per attention rank.

        Args:
            received: in order of the attention ranks.
            exchange: of this stage and micro-batch, where ``node_size`` is more than 1; else ignored.
        """

    @abstractmethod
    def expert_output(self, output: torch.Tensor, state: Any) -> list[Message]:
        """FFN side: one N2M message per attention rank, from the experts' output ``[R, h]``."""

    def _check_tokens(self, hidden: torch.Tensor) -> None:
        if hidden.shape[0] > self.sizes.num_tokens:
            raise ValueError(
                f"{hidden.shape[0]} tokens in a micro-batch; buffers were sized for {self.sizes.num_tokens} "
                f"(--micro-batch-size x --seq-length)"
            )
