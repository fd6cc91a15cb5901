"""What a stage keeps between its forward and its backward: the autograd graph, and no tensor beside it.

A stage's inputs enter its graph through a node of ours that catches their gradients in backward, so no leaf tensor
must stay alive for them. Of the outputs only their places in the graph are kept. So what is alive is what autograd
saved, and memory that a message arrived in is free as soon as nothing there needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_disagmoe.runtime.weight_gradients import WeightGradients
from megatron_disagmoe.schedules.dataflow import Port
from megatron_disagmoe.transport.base import Message
from megatron_disagmoe.transport.dispatch.gradients import no_header

Received = dict[Port, list[Message]]
"""Messages by the port they came through, one per peer."""


class Cut:
    """Where tensors enter a graph; their gradients gather here."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._caught: list[torch.Tensor | None] = []
        self._like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        self._inside: tuple[torch.Tensor, ...] = ()
        if tensors:
            self._inside = _Cut.apply(self._caught, _anchor(tensors[0].device), *tensors)

    def take(self) -> tuple[torch.Tensor, ...]:
        """The same tensors as inputs of the graph, once: the graph alone says how long they live."""
        inside, self._inside = self._inside, ()
        return inside

    def gradients(self) -> list[torch.Tensor]:
        """After backward: the gradient of every tensor, zero where nothing depended on it."""
        caught: Sequence[torch.Tensor | None] = self._caught or [None] * len(self._like)
        return [
            torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
            for gradient, (shape, dtype, device) in zip(caught, self._like, strict=True)
        ]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, caught: list[torch.Tensor | None], anchor: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.caught = caught
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:
        ctx.caught.extend(gradients)
        return (None,) * (2 + len(gradients))


_ANCHORS: dict[torch.device, torch.Tensor] = {}


def _anchor(device: torch.device) -> torch.Tensor:
    """Requires a gradient, so that what ``_Cut`` returns does; its own is never made."""
    if device not in _ANCHORS:
        _ANCHORS[device] = torch.empty(0, device=device, requires_grad=True)
    return _ANCHORS[device]


class Inputs:
    """The messages a stage starts from, cut off from where they came."""

    def __init__(self, received: Received) -> None:
        self._ports: dict[Port, list[int]] = {}
        tensors: list[torch.Tensor] = []
        for port, messages in received.items():
            numbers = self._ports[port] = []
            for message in messages:
                before = len(tensors)
                tensors += [section for section in message.sections if section.is_floating_point()]
                numbers.append(len(tensors) - before)
        self._cut = Cut(tensors)
        inside = self._cut.take()
        at = 0
        self._inside: Received = {}
        for port, messages in received.items():
            cut_off = self._inside[port] = []
            for message, number in zip(messages, self._ports[port], strict=True):
                cut_off.append(Message(message.header, _with(message.sections, inside[at : at + number])))
                at += number

    def take(self) -> Received:
        """The same messages as inputs of the graph, once: the graph alone says how long they live."""
        inside, self._inside = self._inside, {}
        return inside

    def gradients(self) -> Received:
        """After backward: the messages that carry the gradients back, by the port that was received from."""
        found = iter(self._cut.gradients())
        return {
            port: [Message(no_header(), tuple(next(found) for _ in range(number))) for number in numbers]
            for port, numbers in self._ports.items()
        }


def _with(sections: tuple[torch.Tensor, ...], cut_off: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """``sections``, those that can have a gradient replaced."""
    if len(sections) == len(cut_off):
        return cut_off
    inside = iter(cut_off)
    return tuple(next(inside) if section.is_floating_point() else section for section in sections)


class Outputs:
    """Where gradients enter a graph: its differentiable outputs, in the order in which their gradients arrive."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._places: list[tuple[GradientEdge, torch.Size] | None] = [
            (get_gradient_edge(tensor), tensor.shape) if tensor.requires_grad else None for tensor in tensors
        ]

    def backward(self, gradients: Sequence[torch.Tensor]) -> None:
        """One autograd call over all outputs that depend on anything; the graph is gone afterwards."""
        places, self._places = self._places, []
        edges, values = [], []
        for place, gradient in zip(places, gradients, strict=True):
            if place is not None:
                edges.append(place[0])
                values.append(gradient.view(place[1]))
        del places
        if edges:
            torch.autograd.backward(edges, values)


@dataclass(slots=True)
class Live:
    """One stage of one micro-batch from its first action to its last; what its worker keeps of it.

    Attributes:
        inputs, outputs: the two ends of its graph.
        weights: weight gradients put off by ``I``.
        embedding: the graph of the embedding (A(0) alone), and where the stage's own begins behind it.
        again: makes the dispatch once more, where the stage is re-dispatched.
    """

    inputs: Inputs | None = None
    outputs: Outputs | None = None
    weights: WeightGradients = field(default_factory=WeightGradients)
    embedding: tuple[Outputs, Cut] | None = None
    again: Any = None


class Activations:
    """The live activations of a rank, by stage and micro-batch, and the most there ever were."""

    def __init__(self) -> None:
        self._live: dict[tuple[int, int], Live] = {}
        self.high_water = 0

    def __len__(self) -> int:
        return len(self._live)

    def begin(self, layer: int, micro_batch: int) -> Live:
        """A new activation; it counts from now on."""
        key = layer, micro_batch
        assert key not in self._live, f"the activation of stage {layer}, micro-batch {micro_batch} is alive already"
        live = self._live[key] = Live()
        self.high_water = max(self.high_water, len(self._live))
        return live

    def of(self, layer: int, micro_batch: int) -> Live:
        """An activation that is alive."""
        return self._live[layer, micro_batch]

    def end(self, layer: int, micro_batch: int) -> None:
        """It is dead: nothing of it is kept."""
        del self._live[layer, micro_batch]
