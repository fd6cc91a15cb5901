"""Lets Megatron's linear layers put their weight gradients off, where a schedule splits backwards.

The local implementation alone (``transformer_impl local``): Transformer Engine's layers do their own autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_disagmoe import megatron_seams
from megatron_disagmoe.runtime import weight_gradients


def install() -> None:
    """Put our linear function in the place of Megatron's; it acts only inside ``weight_gradients.split``."""
    layers = "megatron.core.tensor_parallel.layers"
    megatron_seams.wrap(f"{layers}:linear_with_grad_accumulation_and_async_allreduce", _linear)
    megatron_seams.wrap("megatron.core.transformer.moe.router:router_gating_linear", _router_linear)


def _linear(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def linear(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **options: Any,
    ) -> torch.Tensor:
        if not weight_gradients.splits():
            return original(
                input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, **options
            )
        assert not allreduce_dgrad, "tensor parallelism with a split backward is refused earlier"
        assert not sequence_parallel, "tensor parallelism with a split backward is refused earlier"
        return weight_gradients.linear(input, weight, bias)

    linear.warned = True  # type: ignore[attr-defined]  # read by Megatron's own function
    return linear


def _router_linear(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def router_gating_linear(
        inp: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, router_dtype: torch.dtype
    ) -> torch.Tensor:
        if not weight_gradients.splits():
            return original(inp, weight, bias, router_dtype)
        return weight_gradients.router_linear(inp, weight, bias, router_dtype)

    return router_gating_linear
