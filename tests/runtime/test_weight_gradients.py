"""Backward in two parts against autograd's own, bit for bit."""

from __future__ import annotations

import pytest
import torch

from megatron_disagmoe.runtime.weight_gradients import (
    WeightGradients,
    accumulate,
    linear,
    put_off,
    router_linear,
    split,
    splits,
)


class Layers(torch.nn.Module):
    """Two linear layers, a norm and a router, as a stage has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(24, 16))
        self.first_bias = torch.nn.Parameter(torch.randn(24))
        self.norm = torch.nn.RMSNorm(24)
        self.second = torch.nn.Parameter(torch.randn(8, 24))
        self.router = torch.nn.Parameter(torch.randn(4, 24))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.norm(torch.tanh(linear(hidden, self.first, self.first_bias)))
        return linear(hidden, self.second, None), router_linear(hidden, self.router, None, torch.float32)


def _backward(layers: Layers, inputs: torch.Tensor, *, later: bool) -> dict[str, torch.Tensor]:
    layers.zero_grad(set_to_none=True)
    hidden = inputs.clone().requires_grad_()
    outputs = layers(hidden)
    gradients = [torch.ones_like(output) for output in outputs]
    if later:
        collector = WeightGradients()
        with put_off(collector):
            torch.autograd.backward(outputs, gradients)
        assert layers.first.grad is None
        assert layers.router.grad is None
        assert layers.norm.weight.grad is not None
        assert len(collector) == 3
        collector.compute()
        assert len(collector) == 0
    else:
        torch.autograd.backward(outputs, gradients)
    found = {name: weight.grad.clone() for name, weight in layers.named_parameters() if weight.grad is not None}
    assert hidden.grad is not None
    return {**found, "input": hidden.grad}


@pytest.mark.parametrize("shape", [(3, 2, 16), (5, 16), (0, 16)])
def test_both_ways_give_the_same_bits(shape: tuple[int, ...]) -> None:
    layers, inputs = Layers(), torch.randn(*shape)
    whole = _backward(layers, inputs, later=False)
    parts = _backward(layers, inputs, later=True)
    assert whole.keys() == parts.keys() == {"input", "norm.weight", "first", "first_bias", "second", "router"}
    for name, gradient in whole.items():
        assert torch.equal(gradient, parts[name]), name


def test_the_products_are_those_of_a_linear_layer() -> None:
    torch.manual_seed(1)
    inputs, weight, bias = torch.randn(4, 3, 16), torch.randn(8, 16), torch.randn(8)
    ours, plain = [[t.clone().requires_grad_() for t in (inputs, weight, bias)] for _ in range(2)]
    for output in (linear(*ours), torch.nn.functional.linear(*plain)):
        (output.sin()).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_the_router_computes_in_its_own_dtype() -> None:
    hidden = torch.randn(6, 24, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 24, dtype=torch.bfloat16, requires_grad=True)
    logits = router_linear(hidden, weight, None, torch.float32)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert torch.equal(logits, hidden.float() @ weight.float().t())


def test_weight_gradients_go_where_megatron_gathers_them() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    accumulate(parameter, torch.ones(2))
    accumulate(parameter, torch.ones(2))
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.full((2,), 2.0))
    parameter.main_grad = torch.zeros(2, dtype=torch.float64)  # type: ignore[attr-defined]
    accumulate(parameter, torch.ones(2))
    assert torch.equal(parameter.main_grad, torch.ones(2, dtype=torch.float64))  # type: ignore[attr-defined]


def test_splitting_is_on_only_inside_its_block() -> None:
    assert not splits()
    with split(True):
        assert splits()
        with split(False):
            assert not splits()
    assert not splits()
