"""The ends of a stage's graph: nothing beside the graph is kept alive, and gradients come out as autograd's own."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from megatron_disagmoe.runtime.activations import Activations, Cut, Inputs, Outputs
from megatron_disagmoe.schedules.actions import Edge
from megatron_disagmoe.schedules.dataflow import Port
from megatron_disagmoe.transport.base import Message

M2N, LANE = Port(Edge.M2N, False, 0), Port(Edge.LANE, False, 0)


def _message(*sections: torch.Tensor) -> Message:
    return Message(torch.tensor([7]), sections)


def _watched(*shape: int) -> tuple[torch.Tensor, weakref.ref[np.ndarray]]:
    """A tensor, and a reference that is dead once nothing uses the tensor's memory any more."""
    memory = np.random.default_rng(0).random(shape, dtype=np.float32)
    return torch.from_numpy(memory), weakref.ref(memory)


def test_gradients_come_back_in_the_shape_of_what_was_received() -> None:
    rows, indices, lane = torch.randn(3, 4), torch.tensor([[1], [2]]), torch.randn(2, 4)
    inputs = Inputs({M2N: [_message(rows, indices), _message(rows.clone(), indices)], LANE: [_message(lane)]})
    inside = inputs.take()
    assert torch.equal(inside[M2N][0].header, torch.tensor([7]))
    assert inside[M2N][0].sections[1] is indices
    outputs = Outputs([inside[M2N][0].sections[0] * 2, (inside[LANE][0].sections[0] * 3).view(4, 2)])
    outputs.backward([torch.ones(3, 4), torch.ones(8, 1)])
    gradients = inputs.gradients()
    assert [len(message.sections) for message in gradients[M2N]] == [1, 1]
    assert torch.equal(gradients[M2N][0].sections[0], torch.full((3, 4), 2.0))
    assert torch.equal(gradients[M2N][1].sections[0], torch.zeros(3, 4)), "nothing depended on it"
    assert torch.equal(gradients[LANE][0].sections[0], torch.full((2, 4), 3.0))


def test_a_stage_without_inputs_has_no_gradients() -> None:
    inputs = Inputs({})
    assert inputs.take() == {}
    assert inputs.gradients() == {}


def test_outputs_that_depend_on_nothing_take_no_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)
    Outputs([torch.ones(2), weight * 2]).backward([torch.ones(2), torch.ones(2)])
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((2,), 2.0))


def test_an_input_that_backward_does_not_need_is_free_after_forward() -> None:
    tensor, memory = _watched(4, 4)
    cut = Cut([tensor])
    del tensor
    (inside,) = cut.take()
    output = inside + 1  # the sum's backward needs no value
    outputs = Outputs([output])
    del inside, output
    assert memory() is None, "only autograd may keep an input alive"
    outputs.backward([torch.ones(4, 4)])
    assert torch.equal(cut.gradients()[0], torch.ones(4, 4))


def test_an_input_that_backward_needs_lives_until_then_and_no_longer() -> None:
    tensor, memory = _watched(4, 4)
    weight = torch.randn(4, 4, requires_grad=True)
    cut = Cut([tensor])
    del tensor
    (inside,) = cut.take()
    outputs = Outputs([inside @ weight])
    del inside
    assert memory() is not None
    outputs.backward([torch.ones(4, 4)])
    assert memory() is None


def test_outputs_are_not_kept() -> None:
    weight = torch.zeros(4, 4, requires_grad=True)
    made = weight + 1
    alive = weakref.ref(made)
    outputs = Outputs([made])
    del made
    assert alive() is None
    outputs.backward([torch.ones(4, 4)])


def test_live_activations_are_counted() -> None:
    activations = Activations()
    first = activations.begin(0, 0)
    activations.begin(1, 0)
    assert activations.of(0, 0) is first
    activations.end(0, 0)
    activations.begin(0, 1)
    assert (len(activations), activations.high_water) == (2, 2)
    with pytest.raises(AssertionError, match="alive already"):
        activations.begin(0, 1)
