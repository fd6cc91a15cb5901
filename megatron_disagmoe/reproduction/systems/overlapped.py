"""Baselines that overlap a forward with another micro-batch's backward, layer by layer: Megatron's own and DualPipe.

Every rank has a compute stream and a communication stream, both in order. In an overlapped pair of chunks the layers
alternate as DeepSeek-V3 orders them (arXiv 2412.19437, figure 4): each all-to-all of one direction runs beside a
compute block of the other. Compute beside communication kernels is slower by the SMs that they take.

Simplifications: every rank of an all-to-all is as slow as the others; pipeline transfers share no bandwidth with
all-to-alls; the slow-down is spread evenly over a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_disagmoe.reproduction.systems.layer import Costs, Layer
from megatron_disagmoe.reproduction.systems.pipeline import Chunks, Do, Shape, Work
from megatron_disagmoe.reproduction.systems.program import Program


@dataclass
class Chain:
    """One chunk of one micro-batch while it is written down: its first and its latest operation, -1 before any."""

    first: int = -1
    last: int = -1


@dataclass
class Writer:
    """Writes chunks into a program. ``sms``: share of SMs that communication kernels take.

    ``slow``: how much longer compute takes on ``slow_rank``.
    """

    chunks: Chunks
    sms: float
    slow: float = 1.0
    slow_rank: int = -1
    program: Program = field(default_factory=Program)
    first: dict[Work, int] = field(default_factory=dict)
    done: dict[Work, int] = field(default_factory=dict)

    def forward(self, rank: int, work: Work) -> None:
        """A forward alone."""
        chain = Chain()
        for layer in self.chunks.layers[work.chunk]:
            self._forward_attention(rank, chain, layer, 1.0)
            self._forward_experts(rank, chain, layer, 1.0)
        self._forward_tail(rank, chain, work)
        self._note(work, chain)

    def backward(self, rank: int, work: Work, *, split: bool = False) -> None:
        """A backward alone; ``split``: its weight gradients come later (``weights``)."""
        chain = Chain()
        self._backward_tail(rank, chain, work)
        for layer in reversed(self.chunks.layers[work.chunk]):
            self._backward_experts(rank, chain, layer, 1.0, split=split)
            self._backward_attention(rank, chain, layer, 1.0, split=split)
        self._note(work, chain)

    def weights(self, rank: int, work: Work) -> None:
        """Weight gradients that a split backward left."""
        layers = self.chunks.layers[work.chunk]
        seconds = sum(layer.attention_weight + layer.ffn_weight for layer in layers)
        after = self.done[Work(Do.BACKWARD, work.chunk, work.micro_batch)]
        self.done[work] = self.program.add(seconds, (after,), stream=("compute", rank), name="W")

    def pair(self, rank: int, forward: Work, backward: Work) -> None:
        """A forward and a backward of different micro-batches, overlapped layer by layer."""
        there = self.chunks.layers[forward.chunk]
        back = tuple(reversed(self.chunks.layers[backward.chunk]))
        slow = self._slow_down(there, back)
        f, b = Chain(), Chain()
        self._backward_tail(rank, b, backward)
        for number in range(max(len(there), len(back))):
            if number < len(back):
                self._receive_gradient(rank, b, back[number])
            if number < len(there):
                self._forward_attention(rank, f, there[number], slow)
            if number < len(back):
                self._backward_experts(rank, b, back[number], slow, received=True)
            if number < len(there):
                self._forward_experts(rank, f, there[number], slow)
            if number < len(back):
                self._backward_attention(rank, b, back[number], slow)
        self._forward_tail(rank, f, forward)
        self._note(forward, f)
        self._note(backward, b)

    def _slow_down(self, there: Sequence[Layer], back: Sequence[Layer]) -> float:
        compute = sum(layer.forward.compute for layer in there)
        compute += sum(layer.backward.compute + layer.again.compute for layer in back)
        beside = sum(layer.forward.communication for layer in there)
        beside += sum(layer.backward.communication for layer in back)
        return 1 + self.sms / (1 - self.sms) * min(1.0, beside / compute)

    def _note(self, work: Work, chain: Chain) -> None:
        self.first[work], self.done[work] = chain.first, chain.last

    def _add(self, chain: Chain, seconds: float, stream: str, rank: int, name: str) -> None:
        if stream == "compute" and rank == self.slow_rank:
            seconds *= self.slow
        number = self.program.add(seconds, (chain.last,), stream=(stream, rank), name=name)
        chain.first = number if chain.first < 0 else chain.first
        chain.last = number

    def _forward_attention(self, rank: int, chain: Chain, layer: Layer, slow: float) -> None:
        self._add(chain, layer.forward.attention * slow, "compute", rank, "F attention")
        self._add(chain, layer.forward.dispatch, "network", rank, "dispatch")

    def _forward_experts(self, rank: int, chain: Chain, layer: Layer, slow: float) -> None:
        self._add(chain, layer.forward.ffn * slow, "compute", rank, "F experts")
        self._add(chain, layer.forward.combine, "network", rank, "combine")

    def _forward_tail(self, rank: int, chain: Chain, work: Work) -> None:
        seconds = self.chunks.tail(work.chunk)[0]
        if seconds:
            self._add(chain, seconds, "compute", rank, "F tail")

    def _backward_tail(self, rank: int, chain: Chain, work: Work) -> None:
        seconds = self.chunks.tail(work.chunk)[1]
        if seconds:
            self._add(chain, seconds, "compute", rank, "B tail")

    def _receive_gradient(self, rank: int, chain: Chain, layer: Layer) -> None:
        self._add(chain, layer.backward.combine, "network", rank, "combine gradient")

    def _backward_experts(
        self, rank: int, chain: Chain, layer: Layer, slow: float, *, received: bool = False, split: bool = False
    ) -> None:
        if not received:
            self._receive_gradient(rank, chain, layer)
        seconds = layer.again.ffn + layer.backward.ffn - (layer.ffn_weight if split else 0.0)
        self._add(chain, seconds * slow, "compute", rank, "B experts")
        self._add(chain, layer.backward.dispatch, "network", rank, "dispatch gradient")

    def _backward_attention(
        self, rank: int, chain: Chain, layer: Layer, slow: float, *, split: bool = False
    ) -> None:
        seconds = layer.again.attention + layer.backward.attention - (layer.attention_weight if split else 0.0)
        self._add(chain, seconds * slow, "compute", rank, "B attention")


def least_overlapped(costs: Costs, shape: Shape) -> float:
    """No step is shorter: all compute, or all communication, of a mean rank."""
    compute = costs.tail_forward + costs.tail_backward
    network = 0.0
    for layer in costs.layers:
        parts = (layer.forward, layer.backward, layer.again)
        compute += sum(each.compute for each in parts)
        network += layer.forward.communication + layer.backward.communication
    return max(compute, network) * shape.micro_batches / shape.ranks
