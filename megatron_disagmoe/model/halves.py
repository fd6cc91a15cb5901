"""Megatron's transformer layer with only the half that a role needs.

Each class builds Megatron's whole layer with its own constructor, so that every random number is drawn where
vanilla Megatron draws it, and drops at once what its role does not hold. Parameter names stay vanilla's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer


class AttentionHalfLayer(TransformerLayer):
    """Attention, norms, router and shared experts; a dense layer stays whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.mlp, MoELayer):
            drop_experts(self.mlp)


class ExpertHalfLayer(TransformerLayer):
    """The routed experts of an MoE layer and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_experts_only(self)


class ForeignLayer(TransformerLayer):
    """A layer that another group holds: built for its random draws, then emptied."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, _ in list(self.named_children()):
            setattr(self, name, IdentityOp())


class SkippedLayer(torch.nn.Module):
    """A layer that another group holds, not built at all."""

    def __init__(self, *args: Any, layer_number: int, **kwargs: Any) -> None:
        super().__init__()
        self.layer_number = layer_number


def drop_experts(moe: MoELayer) -> None:
    """Leave router and shared experts; the dispatcher is ours."""
    moe.experts = None
    moe.token_dispatcher = None


def keep_experts_only(layer: TransformerLayer) -> None:
    """Empty a layer but for its routed experts."""
    moe = layer.mlp
    assert isinstance(moe, MoELayer), f"layer {layer.layer_number} has no experts to keep"
    moe.router = None
    moe.shared_experts = None
    moe.token_dispatcher = None
    for name, _ in list(layer.named_children()):
        if name != "mlp":
            setattr(layer, name, IdentityOp())
