"""Differentiable exchange among the FFN ranks of one node, for the ``per-node`` dispatch mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_disagmoe.transport.base import (
    ChannelSpec,
    Message,
    MessageSpec,
    TransferKey,
    Transport,
)
from megatron_disagmoe.transport.dispatch.gradients import gradient_spec, no_header

#: Steps of a stage that exchange, in order; each has a gradient that runs the other way.
FAN_OUT, FAN_IN = "FANOUT", "FANIN"


class NodeExchange(ABC):
    """One stage of one micro-batch: every rank of the node gives every other a message and gets one.

    It waits for the other ranks of the node within a compute action, like an expert-parallel collective. That cannot
    deadlock: the ranks of a node belong to one group and replica, so they run the same list of actions in the same
    order, and a schedule proven free of deadlock with the group as one actor stays so when the ranks of the group
    meet inside an action (whatever the first rank waits for, the others need only actions before it).

    Args:
        index: this rank's place on the node.
        size: FFN ranks of the group on the node.
    """

    def __init__(self, *, index: int, size: int) -> None:
        self.index, self.size = index, size

    def swap(self, step: str, messages: list[Message], spec: MessageSpec) -> list[Message]:
        """Give ``messages[q]`` to rank ``q`` of the node and return what each rank gave to this one.

        Differentiable: in backward the gradients go the other way. A rank's message to itself is handed over.
        """
        peers = [q for q in range(self.size) if q != self.index]
        if not peers:
            return messages
        headers: list[torch.Tensor] = []
        flat = [tensor for q in peers for tensor in messages[q].sections]
        received = _Swap.apply(self, step, spec, [messages[q].header for q in peers], headers, *flat)
        width = len(spec.sections)
        result = list(messages)
        for i, q in enumerate(peers):
            result[q] = Message(headers[i], tuple(received[i * width : (i + 1) * width]))
        return result

    @abstractmethod
    def move(self, step: str, messages: list[Message], spec: MessageSpec, *, gradient: bool) -> list[Message]:
        """Exchange with every other rank of the node (in order, this rank left out), no history.

        The tensors returned are the caller's to keep.
        """


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        exchange: NodeExchange,
        step: str,
        spec: MessageSpec,
        sent_headers: list[torch.Tensor],
        received_headers: list[torch.Tensor],
        *sections: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        width = len(spec.sections)
        parts = [sections[i : i + width] for i in range(0, len(sections), width)]
        messages = [Message(header, part) for header, part in zip(sent_headers, parts, strict=True)]
        received = exchange.move(step, messages, spec, gradient=False)
        received_headers += [message.header for message in received]
        outputs = tuple(tensor for message in received for tensor in message.sections)
        ctx.exchange, ctx.step, ctx.spec = exchange, step, spec
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in outputs]
        ctx.mark_non_differentiable(*(t for t, s in zip(outputs, _each(spec, outputs), strict=True) if not s))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        spec: MessageSpec = ctx.spec
        kept = [
            torch.zeros(like[0], dtype=like[1], device=like[2]) if gradient is None else gradient
            for gradient, like, differentiable in zip(gradients, ctx.like, _each(spec, gradients), strict=True)
            if differentiable
        ]
        grad_spec = gradient_spec(spec)
        width = len(grad_spec.sections)
        messages = [Message(no_header(), tuple(kept[i : i + width])) for i in range(0, len(kept), width)]
        received = ctx.exchange.move(ctx.step, messages, grad_spec, gradient=True)
        back = iter([tensor for message in received for tensor in message.sections])
        return None, None, None, None, None, *(next(back) if d else None for d in _each(spec, gradients))


def _each(spec: MessageSpec, tensors: Sequence[Any]) -> list[bool]:
    """Whether each of several messages' sections is differentiable."""
    return [section.differentiable for section in spec.sections] * (len(tensors) // len(spec.sections))


@dataclass(frozen=True)
class NodeChannels:
    """The channels among the FFN ranks of one node and group: each has all of them as sources and targets."""

    fan_out: ChannelSpec
    fan_in: ChannelSpec
    fan_out_grad: ChannelSpec
    fan_in_grad: ChannelSpec

    @classmethod
    def among(cls, ranks: Sequence[int], *, name: str) -> NodeChannels:
        """Channels among global ``ranks``; ``name`` says whose they are (such as ``"F1 r0 node 2"``)."""
        members = tuple(ranks)
        names = (FAN_OUT, FAN_IN, f"{FAN_OUT}.grad", f"{FAN_IN}.grad")
        return cls(*(ChannelSpec(f"{step} {name}", members, members) for step in names))

    @property
    def all(self) -> list[ChannelSpec]:
        """For `create_transport`."""
        return [self.fan_out, self.fan_in, self.fan_out_grad, self.fan_in_grad]

    def of(self, step: str, *, gradient: bool) -> ChannelSpec:
        """The channel of a step."""
        if step == FAN_OUT:
            return self.fan_out_grad if gradient else self.fan_out
        return self.fan_in_grad if gradient else self.fan_in


class TransportExchange(NodeExchange):
    """A `NodeExchange` over a transport; one object per stage and micro-batch.

    Args:
        transport: created with ``channels.all`` among its channels.
        channels: the node's.
        rank: this process's global rank.
        layer: MoE layer of the stage.
        micro_batch: its micro-batch.
    """

    def __init__(
        self, transport: Transport, channels: NodeChannels, *, rank: int, layer: int, micro_batch: int
    ) -> None:
        ranks = channels.fan_out.source_ranks
        super().__init__(index=ranks.index(rank), size=len(ranks))
        self._transport, self._channels = transport, channels
        self._peers = [peer for peer in ranks if peer != rank]
        self._layer, self._micro_batch = layer, micro_batch

    def move(self, step: str, messages: list[Message], spec: MessageSpec, *, gradient: bool) -> list[Message]:
        channel = self._channels.of(step, gradient=gradient)
        key = TransferKey(step, gradient, self._layer, self._micro_batch)
        handles = [self._transport.post_recv(channel, key, peer, spec) for peer in self._peers]
        for peer, message in zip(self._peers, messages, strict=True):
            self._transport.send(channel, key, peer, message, spec)
        return [handle.take() for handle in handles]
