"""Gets batches out of the user's ``forward_step`` without running a model.

``forward_step(data_iterator, model)`` is called once per micro-batch with a stand-in that writes down what the model
was called with; what it returns as the loss function is kept for the tail.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_disagmoe.model.stages import Batch

_SIGNATURE = inspect.signature(GPTModel.forward)
_TAKEN = ("input_ids", "position_ids", "attention_mask", "labels", "loss_mask")


class RecordingModel:
    """Looks like the model to ``forward_step`` and records the arguments of the call."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.recorded: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Record the call; the result only stands for the output."""
        arguments = _SIGNATURE.bind(self.model, *args, **kwargs).arguments
        extra = [name for name, value in arguments.items() if name not in (*_TAKEN, "self") and value is not None]
        if extra:
            raise ValueError(
                f"forward_step passes {', '.join(extra)} to the model, which --af-pipe does not support; "
                f"it hands on {', '.join(_TAKEN)}"
            )
        self.recorded = {name: arguments.get(name) for name in _TAKEN}
        return torch.zeros(())


class BatchFeed:
    """The micro-batches of one step, drawn in order when they are first asked for and dropped after their last use.

    Args:
        forward_step: the user's.
        data_iterator: Megatron's.
        model: this rank's (wrapped) model.
        uses: how often each micro-batch is asked for on this rank.
    """

    def __init__(self, forward_step: Callable[..., Any], data_iterator: Any, model: Any, *, uses: int) -> None:
        self._forward_step = forward_step
        self._data_iterator = data_iterator
        self._stand_in = RecordingModel(model)
        self._uses = uses
        self._drawn = 0
        self._held: dict[int, tuple[Batch, int]] = {}

    def __call__(self, micro_batch: int) -> Batch:
        """The batch of a micro-batch."""
        while self._drawn <= micro_batch:
            self._held[self._drawn] = (self._draw(), self._uses)
            self._drawn += 1
        batch, left = self._held.pop(micro_batch)
        if left > 1:
            self._held[micro_batch] = (batch, left - 1)
        return batch

    def _draw(self) -> Batch:
        _, loss_func = self._forward_step(self._data_iterator, self._stand_in)
        if self._stand_in.recorded is None:
            raise ValueError("forward_step returned without calling the model; --af-pipe needs its arguments")
        batch = Batch(**self._stand_in.recorded, loss_func=loss_func)
        self._stand_in.recorded = None
        return batch
