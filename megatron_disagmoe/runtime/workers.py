"""What compute actions do with autograd: the graph is cut at stage boundaries, gradients are carried across by hand.

    F   runs the stage on its inputs as they came, emits the outputs, keeps the graph
    B   runs the graph backward over all outputs at once (the experts' gradient and the lane's), emits the gradients
    I   the same, with the weight gradients put off       W   makes those
    D   makes the dispatch of a stage once more, for an FFN rank that kept nothing of it
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from megatron_disagmoe.model.stages import AttentionStages, Batch, ExpertStages
from megatron_disagmoe.runtime import lane as lanes
from megatron_disagmoe.runtime.activations import Activations, Cut, Inputs, Live, Outputs, Received
from megatron_disagmoe.runtime.executor import Emit
from megatron_disagmoe.runtime.weight_gradients import put_off
from megatron_disagmoe.schedules.actions import Action, Edge, Kind
from megatron_disagmoe.schedules.dataflow import Port
from megatron_disagmoe.transport.base import Message
from megatron_disagmoe.transport.dispatch import NodeExchange

Again = frozenset[tuple[int, int]]
"""Stages and micro-batches that are dispatched twice (``schedules.dataflow.redispatched``)."""


def detached(messages: list[Message]) -> list[Message]:
    """The same messages without their autograd history."""
    return [Message(m.header, tuple(section.detach() for section in m.sections)) for m in messages]


def _backward(kind: Kind, live: Live, gradients: list[torch.Tensor]) -> None:
    outputs, live.outputs = live.outputs, None
    assert outputs is not None, "backward comes once, after forward"
    with put_off(live.weights) if kind is Kind.I else contextlib.nullcontext():
        outputs.backward(gradients)


def _emit_gradients(live: Live, emit: Emit) -> None:
    inputs, live.inputs = live.inputs, None
    assert inputs is not None, "forward has set them"
    for port, messages in inputs.gradients().items():
        edge = Edge.M2N if port.edge is Edge.AGAIN else port.edge  # one gradient, however often the tokens came
        emit(Port(edge, True, port.layer), messages)


class AttentionWorker:
    """A(i) and the tail.

    Args:
        stages: the computation.
        num_stages: L; stage L is the tail.
        batch: gives the batch of a micro-batch; may be asked repeatedly.
        loss: turns micro-batch, tail's output and the batch's loss function into the scalar to differentiate.
        forward_only: keep nothing for a backward.
        again: what this rank dispatches twice.
        embedding_backward: entered around the embedding's backward.
    """

    def __init__(
        self,
        stages: AttentionStages,
        num_stages: int,
        *,
        batch: Callable[[int], Batch],
        loss: Callable[[int, torch.Tensor, Callable[..., Any]], torch.Tensor],
        forward_only: bool,
        again: Again = frozenset(),
        embedding_backward: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.stages = stages
        self.num_stages = num_stages
        self.batch = batch
        self.loss = loss
        self.forward_only = forward_only
        self.again = again
        self.embedding_backward = embedding_backward
        self.activations = Activations()

    def run(self, action: Action, received: Received, emit: Emit) -> None:
        """See ``runtime.executor.Worker``."""
        kind, stage, micro_batch = action.kind, action.layer, action.micro_batch
        if kind is Kind.F:
            live = self.activations.begin(stage, micro_batch)
            self._forward(live, stage, micro_batch, received, emit)
            if self.forward_only:
                self.activations.end(stage, micro_batch)
            return
        live = self.activations.of(stage, micro_batch)
        if kind is Kind.D:
            self._dispatch_again(live, stage, emit)
            return
        if kind is not Kind.W:
            _backward(kind, live, self._gradients(stage, received))
            _emit_gradients(live, emit)
        if kind is not Kind.I:
            live.weights.compute()
            self._embedding_backward(live)
            self.activations.end(stage, micro_batch)

    def _forward(self, live: Live, stage: int, micro_batch: int, received: Received, emit: Emit) -> None:
        if not self.forward_only:
            live.inputs = Inputs(received)
            received = live.inputs.take()
        combined = received.get(Port(Edge.N2M, False, stage - 1))
        lane_in = received.get(Port(Edge.LANE, False, stage - 1))
        lane = lanes.unpack(lane_in[0]) if lane_in is not None else None
        batch = self.batch(micro_batch)
        if stage == self.num_stages:
            assert combined is not None
            assert lane is not None
            outputs = [self.loss(micro_batch, self.stages.tail(batch, combined, lane), batch.loss_func)]
        else:

            def dispatch(messages: list[Message]) -> None:
                emit(Port(Edge.M2N, False, stage), detached(messages))

            def embedded(hidden: torch.Tensor) -> torch.Tensor:
                return hidden if self.forward_only else _cut_embedding(live, hidden)

            made = self.stages.forward(stage, batch, combined, lane, dispatch, embedded)
            emit(Port(Edge.LANE, False, stage), [lanes.pack(made.lane)])
            outputs = made.tensors()
            if (stage, micro_batch) in self.again:
                live.again = made.again
        if not self.forward_only:
            live.outputs = Outputs(outputs)

    def _gradients(self, stage: int, received: Received) -> list[torch.Tensor]:
        if stage == self.num_stages:
            return [torch.ones(())]
        messages = [*received[Port(Edge.M2N, True, stage)], *received[Port(Edge.LANE, True, stage)]]
        return [gradient for message in messages for gradient in message.sections]

    def _dispatch_again(self, live: Live, stage: int, emit: Emit) -> None:
        assert live.again is not None, "the schedule said so when the stage ran"
        dispatch, live.again = live.again, None
        with torch.no_grad():
            emit(Port(Edge.AGAIN, False, stage), dispatch())

    def _embedding_backward(self, live: Live) -> None:
        if live.embedding is None:
            return
        outputs, cut = live.embedding
        with self.embedding_backward():
            outputs.backward(cut.gradients())


def _cut_embedding(live: Live, hidden: torch.Tensor) -> torch.Tensor:
    """Cut the embedding off, so that its backward can wait for ``W`` as other weight gradients do."""
    cut = Cut([hidden.detach()])
    live.embedding = Outputs([hidden]), cut
    return cut.take()[0]


class ExpertWorker:
    """F(i).

    Args:
        stages: the computation.
        forward_only: keep nothing for a backward.
        again: what arrives twice: forward keeps nothing of it, backward runs forward again.
        exchange: of a stage and micro-batch, where the dispatch mode needs one among FFN ranks.
    """

    def __init__(
        self,
        stages: ExpertStages,
        *,
        forward_only: bool,
        again: Again = frozenset(),
        exchange: Callable[[int, int], NodeExchange | None] = lambda stage, micro_batch: None,
    ) -> None:
        self.stages = stages
        self.forward_only = forward_only
        self.again = again
        self.exchange = exchange
        self.activations = Activations()

    def run(self, action: Action, received: Received, emit: Emit) -> None:
        """See ``runtime.executor.Worker``."""
        kind, stage, micro_batch = action.kind, action.layer, action.micro_batch
        again = (stage, micro_batch) in self.again
        if kind is Kind.F:
            live = self.activations.begin(stage, micro_batch)
            if self.forward_only or again:
                with torch.no_grad():
                    results = self._forward(stage, micro_batch, received, Edge.M2N)
                self.activations.end(stage, micro_batch)
            else:
                results = self._with_graph(live, stage, micro_batch, received, Edge.M2N)
            emit(Port(Edge.N2M, False, stage), detached(results))
            return
        if kind is Kind.W:
            live = self.activations.of(stage, micro_batch)
        else:
            gradients = [message.sections[0] for message in received.pop(Port(Edge.N2M, True, stage))]
            if again:
                live = self.activations.begin(stage, micro_batch)
                self._with_graph(live, stage, micro_batch, received, Edge.AGAIN)
            live = self.activations.of(stage, micro_batch)
            _backward(kind, live, gradients)
            _emit_gradients(live, emit)
        if kind is not Kind.I:
            live.weights.compute()
            self.activations.end(stage, micro_batch)

    def _forward(self, stage: int, micro_batch: int, received: Received, edge: Edge) -> list[Message]:
        messages = received.pop(Port(edge, False, stage))
        return self.stages.forward(stage, messages, self.exchange(stage, micro_batch))

    def _with_graph(
        self, live: Live, stage: int, micro_batch: int, received: Received, edge: Edge
    ) -> list[Message]:
        live.inputs = Inputs(received)
        results = self._forward(stage, micro_batch, live.inputs.take(), edge)
        live.outputs = Outputs([message.sections[0] for message in results])
        return results
