"""Keeps the two gradients of a tied embedding apart until the step is over, where one rank holds both its ends.

Added to one accumulator they would mix in the order of the schedule, and floating-point sums depend on it. Apart, every
schedule gives the same bits, and the same as where embedding and output layer are on different groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel


class TiedEmbedding:
    """Does nothing unless ``model`` holds embedding and output layer with one weight."""

    def __init__(self, model: GPTModel) -> None:
        self._weight: Any = None  # a parameter with Megatron's main_grad
        if model.share_embeddings_and_output_weights and model.pre_process and model.post_process:
            self._weight = model.embedding.word_embeddings.weight
        self._embedding_gradient: torch.Tensor | None = None

    @contextlib.contextmanager
    def embedding_backward(self) -> Iterator[None]:
        """A backward in this block adds the weight's gradient to an accumulator of its own."""
        weight = self._weight
        if weight is None:
            yield
            return
        if self._embedding_gradient is None:
            self._embedding_gradient = torch.zeros_like(weight.main_grad)
        main_grad, weight.main_grad = weight.main_grad, self._embedding_gradient
        try:
            yield
        finally:
            weight.main_grad = main_grad

    def add_up(self) -> None:
        """At the end of a step: add the embedding's gradient to the output layer's."""
        if self._weight is not None and self._embedding_gradient is not None:
            self._weight.main_grad.add_(self._embedding_gradient)
            self._embedding_gradient.zero_()
