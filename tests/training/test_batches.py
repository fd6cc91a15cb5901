"""Batches come out of the user's ``forward_step`` without a model being run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_disagmoe import cpu

cpu.install_if_needed()

from megatron_disagmoe.training.batches import BatchFeed, RecordingModel  # noqa: E402


class Model:
    vp_stage = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("the model must not run")


def forward_step(data: Iterator[int], model: Any) -> tuple[torch.Tensor, Callable[[], int]]:
    number = next(data)
    assert model.vp_stage is None
    tokens = torch.full((1, 4), number)
    output = model(tokens, tokens + 1, None, labels=tokens + 2, loss_mask=tokens + 3)
    return output, lambda: number


def feed(uses: int, step: Callable[..., Any] = forward_step) -> tuple[BatchFeed, Iterator[int]]:
    numbers = iter(range(100))
    return BatchFeed(step, numbers, Model(), uses=uses), numbers


def test_the_arguments_of_the_call_and_the_loss_function_are_kept() -> None:
    batch = feed(1)[0](0)
    tensors = (batch.input_ids, batch.position_ids, batch.labels, batch.loss_mask)
    assert [int(tensor[0, 0]) for tensor in tensors if tensor is not None] == [0, 1, 2, 3]
    assert batch.attention_mask is None
    assert batch.loss_func() == 0


def test_micro_batches_are_drawn_in_order_whoever_asks_first() -> None:
    batches, numbers = feed(1)
    assert batches(2).loss_func() == 2
    assert batches(0).loss_func() == 0
    assert batches(1).loss_func() == 1
    assert next(numbers) == 3  # none was drawn ahead


def test_a_batch_is_the_same_at_each_use_and_dropped_after_the_last() -> None:
    batches, numbers = feed(3)
    assert batches(0) is batches(0) is batches(0)
    with pytest.raises(KeyError):
        batches(0)
    assert next(numbers) == 1


def test_what_is_not_handed_on_is_refused() -> None:
    with pytest.raises(ValueError, match="passes packed_seq_params to the model, which --af-pipe does not support"):
        RecordingModel(Model())(torch.zeros(1), None, None, packed_seq_params=object())


def test_a_forward_step_that_calls_no_model_is_refused() -> None:
    batches, _ = feed(1, lambda data, model: (torch.zeros(()), None))
    with pytest.raises(ValueError, match="returned without calling the model"):
        batches(0)
