"""What compute actions do with autograd: cut the graph at stage boundaries, carry gradients across them by hand.

A stage's inputs become leaves; its outputs stay attached until its backward, which runs one autograd call over all
of them (the experts' gradient and the lane's together) and hands the leaves' gradients on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_disagmoe.model.stages import AttentionStages, Batch, ExpertStages, Lane
from megatron_disagmoe.runtime import lane as lanes
from megatron_disagmoe.runtime.executor import Emit, Received
from megatron_disagmoe.schedules.actions import Action, Edge, Kind
from megatron_disagmoe.schedules.dataflow import Port
from megatron_disagmoe.transport.base import Message
from megatron_disagmoe.transport.dispatch.base import no_header


@dataclass
class Live:
    """What a stage keeps between its forward and its backward.

    Attributes:
        leaves: differentiable inputs, per port and message.
        outputs: differentiable outputs, in the order in which their gradients arrive.
    """

    leaves: dict[Port, list[list[torch.Tensor]]]
    outputs: list[torch.Tensor]


def as_leaves(messages: list[Message], *, grad: bool) -> list[list[torch.Tensor]]:
    """Mark every floating-point section as an input of autograd; they are returned per message."""
    found = [[section for section in message.sections if section.is_floating_point()] for message in messages]
    if grad:
        for sections in found:
            for section in sections:
                section.requires_grad_()
    return found


def gradients(leaves: list[list[torch.Tensor]]) -> list[Message]:
    """Messages with the leaves' gradients, zero where nothing depended on a leaf."""
    return [
        Message(no_header(), tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in sections))
        for sections in leaves
    ]


def detached(messages: Sequence[Message]) -> list[Message]:
    """The same messages without their autograd history."""
    return [Message(m.header, tuple(section.detach() for section in m.sections)) for m in messages]


def run_backward(outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    """One autograd call over all outputs that depend on anything."""
    pairs = [
        (output, grad.view_as(output)) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])


class AttentionWorker:
    """A(i) and the tail.

    Args:
        stages: the computation.
        num_stages: L; stage L is the tail.
        batch: gives the batch of a micro-batch; may be asked repeatedly.
        done_with_batch: told when this rank needs a micro-batch's batch no more.
        loss: turns micro-batch, tail's output and the batch's loss function into the scalar to differentiate.
        forward_only: keep nothing for a backward.
    """

    def __init__(
        self,
        stages: AttentionStages,
        num_stages: int,
        *,
        batch: Callable[[int], Batch],
        loss: Callable[[int, torch.Tensor, Callable[..., Any]], torch.Tensor],
        forward_only: bool,
    ) -> None:
        self.stages = stages
        self.num_stages = num_stages
        self.batch = batch
        self.loss = loss
        self.forward_only = forward_only
        self.live: dict[tuple[int, int], Live] = {}

    def run(self, action: Action, received: Received, emit: Emit) -> None:
        """See ``runtime.executor.Worker``."""
        if action.kind is Kind.F:
            self._forward(action.layer, action.micro_batch, received, emit)
        elif action.kind is Kind.B:
            self._backward(action.layer, action.micro_batch, received, emit)
        else:
            raise ValueError(f"this worker does not run {action.kind.value} actions; use a schedule of F and B")

    def _forward(self, stage: int, micro_batch: int, received: Received, emit: Emit) -> None:
        leaves = {port: as_leaves(messages, grad=not self.forward_only) for port, messages in received.items()}
        combined = received.get(Port(Edge.N2M, False, stage - 1))
        lane_in = received.get(Port(Edge.LANE, False, stage - 1))
        lane = lanes.unpack(lane_in[0]) if lane_in is not None else None
        batch = self.batch(micro_batch)
        outputs: list[torch.Tensor] = []
        if stage == self.num_stages:
            assert combined is not None and lane is not None
            output = self.stages.tail(batch, combined, lane)
            outputs.append(self.loss(micro_batch, output, batch.loss_func))
        else:
            outputs.extend(self._dispatching(stage, micro_batch, batch, combined, lane, emit))
        if not self.forward_only:
            self.live[stage, micro_batch] = Live(leaves, outputs)

    def _dispatching(
        self,
        stage: int,
        micro_batch: int,
        batch: Batch,
        combined: list[Message] | None,
        lane: Lane | None,
        emit: Emit,
    ) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []

        def dispatch(messages: list[Message]) -> None:
            emit(Port(Edge.M2N, False, stage), detached(messages))
            outputs.extend(t for message in messages for t in message.sections if t.is_floating_point())

        lane_out = self.stages.forward(stage, batch, combined, lane, dispatch)
        emit(Port(Edge.LANE, False, stage), [lanes.pack(lane_out)])
        outputs.extend(lane_out.tensors())
        return outputs

    def _backward(self, stage: int, micro_batch: int, received: Received, emit: Emit) -> None:
        live = self.live.pop((stage, micro_batch))
        if stage == self.num_stages:
            live.outputs[0].backward()
        else:
            messages = [*received[Port(Edge.M2N, True, stage)], *received[Port(Edge.LANE, True, stage)]]
            run_backward(live.outputs, [grad for message in messages for grad in message.sections])
        for port, leaves in live.leaves.items():
            emit(Port(port.edge, True, port.layer), gradients(leaves))


class ExpertWorker:
    """F(i)."""

    def __init__(self, stages: ExpertStages, *, forward_only: bool) -> None:
        self.stages = stages
        self.forward_only = forward_only
        self.live: dict[tuple[int, int], Live] = {}

    def run(self, action: Action, received: Received, emit: Emit) -> None:
        """See ``runtime.executor.Worker``."""
        key = (action.layer, action.micro_batch)
        if action.kind is Kind.F:
            (messages,) = received.values()
            leaves = {port: as_leaves(m, grad=not self.forward_only) for port, m in received.items()}
            results = self.stages.forward(action.layer, messages)
            emit(Port(Edge.N2M, False, action.layer), detached(results))
            if not self.forward_only:
                self.live[key] = Live(leaves, [message.sections[0] for message in results])
        elif action.kind is Kind.B:
            live = self.live.pop(key)
            grads = received[Port(Edge.N2M, True, action.layer)]
            run_backward(live.outputs, [message.sections[0] for message in grads])
            (leaves_of_port,) = live.leaves.values()
            emit(Port(Edge.M2N, True, action.layer), gradients(leaves_of_port))
        else:
            raise ValueError(f"this worker does not run {action.kind.value} actions; use a schedule of F and B")
