"""A model small enough to hold in the head, cut into stages as the real one is, and the same model in one piece.

A(i): ``hidden = lane + experts' rows``; dispatch ``tanh(hidden W_i)``; lane ``hidden``. F(i): ``rows V_i``. Tail: the
sum of ``hidden H``. A(0) begins with the embedding ``x E``. Every stage computes from memory that is watched, so a test
can see when it is free.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_disagmoe.model.stages import Dispatched, Lane
from megatron_disagmoe.runtime.weight_gradients import linear
from megatron_disagmoe.transport.base import Message
from megatron_disagmoe.transport.dispatch import CombineState, NodeExchange
from megatron_disagmoe.transport.dispatch.gradients import no_header

WIDTH, TOKENS = 4, 6


class Weights:
    """All weights of the model; every rank of a test has its own equal copy."""

    def __init__(self, num_layers: int) -> None:
        generator = torch.Generator().manual_seed(num_layers)

        def weight() -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))

        self.embedding, self.head = weight(), weight()
        self.attention = [weight() for _ in range(num_layers)]
        self.experts = [weight() for _ in range(num_layers)]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        named = {"embedding": self.embedding, "head": self.head}
        named |= {f"attention {i}": weight for i, weight in enumerate(self.attention)}
        named |= {f"experts {i}": weight for i, weight in enumerate(self.experts)}
        return {name: weight.grad for name, weight in named.items() if weight.grad is not None}


def inputs(micro_batch: int) -> torch.Tensor:
    """What a micro-batch begins with, ``[TOKENS, 1, WIDTH]``."""
    return torch.randn(TOKENS, 1, WIDTH, generator=torch.Generator().manual_seed(micro_batch))


def in_one_piece(weights: Weights, num_micro_batches: int) -> list[torch.Tensor]:
    """Forward and backward of the whole model, one micro-batch after the other; the losses."""
    losses = []
    for micro_batch in range(num_micro_batches):
        hidden = linear(inputs(micro_batch), weights.embedding, None)
        for attention, experts in zip(weights.attention, weights.experts, strict=True):
            rows = torch.tanh(linear(hidden, attention, None)).view(-1, WIDTH)
            hidden = hidden + linear(rows, experts, None).view_as(hidden)
        loss = linear(hidden, weights.head, None).sum()
        loss.backward()
        losses.append(loss.detach())
    return losses


class Watch:
    """Which stages' memory is in use."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, int], weakref.ref[np.ndarray]] = {}

    def move(self, key: tuple[int, int], tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in memory of its own that is watched under ``key``; its gradient passes."""
        return _Move.apply(tensor, self._memory, key)

    def in_use(self) -> set[tuple[int, int]]:
        """The keys whose memory something still uses."""
        return {key for key, memory in self._memory.items() if memory() is not None}


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, memory: dict[Any, Any], key: tuple[int, int]) -> torch.Tensor:
        copied = tensor.detach().numpy().copy()
        memory[key] = weakref.ref(copied)
        return torch.from_numpy(copied)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0], None, None


class ToyAttention:
    """In the place of ``AttentionStages``; a batch is the number of its micro-batch."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.watch = Watch()

    def forward(
        self,
        stage: int,
        batch: Any,
        combined: list[Message] | None,
        lane: Lane | None,
        emit: Callable[[list[Message]], None],
        embedded: Callable[[torch.Tensor], torch.Tensor],
    ) -> Dispatched:
        if stage == 0:
            hidden = embedded(linear(inputs(batch.micro_batch), self.weights.embedding, None))
        else:
            hidden = self._hidden(combined, lane)
        moved = self.watch.move((stage, batch.micro_batch), hidden)
        rows = torch.tanh(linear(moved, self.weights.attention[stage], None)).view(-1, WIDTH)
        messages = [Message(no_header(), (rows,))]
        emit(messages)
        kept = rows.detach().clone()
        return Dispatched(
            messages, Lane(hidden, None, CombineState(None, TOKENS)), lambda: [Message(no_header(), (kept,))]
        )

    def tail(self, batch: Any, combined: list[Message], lane: Lane) -> torch.Tensor:
        moved = self.watch.move((len(self.weights.attention), batch.micro_batch), self._hidden(combined, lane))
        return linear(moved, self.weights.head, None)

    def _hidden(self, combined: list[Message] | None, lane: Lane | None) -> torch.Tensor:
        assert combined is not None
        assert lane is not None
        return lane.residual + combined[0].sections[0].view_as(lane.residual)


class ToyExperts:
    """In the place of ``ExpertStages``."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.watch = Watch()
        self.micro_batch = -1

    def forward(self, stage: int, received: list[Message], exchange: NodeExchange | None = None) -> list[Message]:
        moved = self.watch.move((stage, self.micro_batch), received[0].sections[0])
        return [Message(no_header(), (linear(moved, self.weights.experts[stage], None),))]
