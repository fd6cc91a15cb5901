"""Backward in two parts: gradients of inputs at once, weight gradients of linear layers when they are asked for.

Autograd cannot do it by itself: one backward of a linear layer makes both gradients, also where only some inputs are
asked for (``ctx.needs_input_grad`` is fixed in forward). So linear layers of a stage whose backward is split run
through ``linear`` here, whose backward leaves ``(input, gradient of output)`` with the collector in force, and
``WeightGradients.compute`` multiplies them later. It uses the same products and sums as the undivided backward and adds
them to the same accumulator, so both give the same bits.

What is not a linear layer (norms, biases added outside of one) costs next to nothing and is done with the inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class WeightGradients:
    """Weight gradients put off, in the order in which backward came by."""

    def __init__(self) -> None:
        self._later: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._later)

    def add(self, later: Callable[[], None]) -> None:
        """Do this when the weight gradients are asked for."""
        self._later.append(later)

    @torch.no_grad()
    def compute(self) -> None:
        """Make all of them and let go of what they were made from."""
        later, self._later = self._later, []
        later.reverse()
        while later:
            later.pop()()


_collector: WeightGradients | None = None
_splits = False


def splits() -> bool:
    """Whether linear layers are to run through ``linear`` now."""
    return _splits


@contextlib.contextmanager
def split(enabled: bool) -> Iterator[None]:
    """Forwards in this block may be followed by a backward in two parts, where ``enabled``."""
    global _splits
    before, _splits = _splits, enabled
    try:
        yield
    finally:
        _splits = before


@contextlib.contextmanager
def put_off(collector: WeightGradients) -> Iterator[None]:
    """A backward in this block leaves its weight gradients with ``collector``."""
    global _collector
    assert _collector is None, "one backward at a time"
    _collector = collector
    try:
        yield
    finally:
        _collector = None


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``input @ weight.t() (+ bias)``: values and gradients are bit for bit Megatron's local linear layer's.

    Args:
        input: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
    """
    return _Linear.apply(input, weight, bias, None)


def router_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``linear`` computed in ``dtype``, as Megatron's ``router_gating_linear``; the result is in ``dtype``."""
    return _Linear.apply(input, weight, bias, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.bias, ctx.dtype = bias, dtype
        if dtype is None:
            output = torch.matmul(input, weight.t())
            return output if bias is None else output + bias
        rows, matrix = input.view(-1, input.shape[-1]).to(dtype), weight.to(dtype).t()
        output = torch.mm(rows, matrix) if bias is None else torch.addmm(bias.to(dtype), rows, matrix)
        return output.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        input, weight = ctx.saved_tensors
        bias, dtype = ctx.bias, ctx.dtype
        matrix = weight if dtype is None else weight.to(dtype)
        to_input = gradient.matmul(matrix).to(input.dtype) if ctx.needs_input_grad[0] else None
        if _collector is None:
            to_weight, to_bias = _products(input, gradient, weight, bias, dtype)
            return to_input, to_weight, to_bias, None

        def later() -> None:
            to_weight, to_bias = _products(input, gradient, weight, bias, dtype)
            accumulate(weight, to_weight)
            if to_bias is not None:
                assert bias is not None, "it has a gradient"
                accumulate(bias, to_bias)

        _collector.add(later)
        return to_input, None, None, None


def _products(
    input: torch.Tensor,
    gradient: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = input.contiguous().view(-1, input.shape[-1])
    gradient = gradient.contiguous().view(-1, gradient.shape[-1])
    to_weight = gradient.t().matmul(rows if dtype is None else rows.to(dtype)).to(weight.dtype)
    return to_weight, None if bias is None else gradient.sum(dim=0).to(bias.dtype)


def accumulate(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add to a parameter's gradient where Megatron's DistributedDataParallel does: ``main_grad``, else ``grad``."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        main_grad.add_(gradient)
    elif parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
