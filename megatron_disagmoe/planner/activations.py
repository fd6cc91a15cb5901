"""Bytes that a stage keeps from its forward to its backward, per token; what recomputation saves of them.

Follows Korthikanti et al. (arXiv 2205.05198, section 4) for what autograd keeps, with fused attention (scores are not
kept, one log-sum-exp per head is) and Megatron's modules. ``selective`` drops what norms, activation functions and the
latent up-projections make (``--recompute-modules layernorm moe_act shared_experts mla_up_proj``); ``full`` keeps the
stage's input alone. On the FFN side nothing is kept where the tokens are dispatched again.
"""

from __future__ import annotations

import enum

from megatron_disagmoe.planner.model_spec import LatentAttention, ModelSpec


class Recompute(enum.IntEnum):
    """How much of a stage's forward is run again before its backward."""

    NONE = 0
    SELECTIVE = 1
    FULL = 2

    @property
    def label(self) -> str:
        return self.name.lower()


#: Router's logits and probabilities in fp32, its map in one byte.
_ROUTER_BYTES_PER_EXPERT = 9
#: A probability (fp32) and an id (int32) beside each (token, expert) pair.
PAIR_BYTES = 8


def attention_bytes(model: ModelSpec, *, recompute: Recompute, width: int) -> float:
    """Kept by one layer's attention with its norm, per token; ``width`` bytes a number."""
    h, attention = model.hidden_size, model.attention
    heads, key, value = attention.num_heads, attention.key_dim, attention.value_dim
    numbers = h + heads * value  # the norm's input; what attention hands to the output projection
    if recompute < Recompute.SELECTIVE:
        numbers += h
    if isinstance(attention, LatentAttention):
        numbers += 2 * attention.q_lora_rank + 2 * attention.kv_lora_rank + attention.qk_rope_dim
        if recompute < Recompute.SELECTIVE:
            numbers += heads * (2 * key + value)
    else:
        groups = attention.num_query_groups
        numbers += (heads + 2 * groups) * key + (heads + groups) * key * attention.qk_norm
    return numbers * width + 4 * heads


def mlp_bytes(model: ModelSpec, *, ffn_hidden_size: int, recompute: Recompute, width: int) -> float:
    """Kept by an MLP beside its input."""
    inner = model.matrices_per_mlp - 1
    return (inner + (recompute < Recompute.SELECTIVE)) * ffn_hidden_size * width


def norm_bytes(model: ModelSpec, *, recompute: Recompute, width: int) -> float:
    """Kept by a norm: its input, and its output where that is not made again."""
    return (2 - (recompute >= Recompute.SELECTIVE)) * model.hidden_size * width


def stage_bytes(model: ModelSpec, *, stage: int, recompute: Recompute, width: int) -> float:
    """Kept by A(stage) per token (the tail's logits apart)."""
    layers = model.stage_layers[stage]
    if recompute is Recompute.FULL:
        return model.hidden_size * width
    dense = set(model.dense_layers)
    total = 0.0
    for layer in layers:
        total += attention_bytes(model, recompute=recompute, width=width)
        total += norm_bytes(model, recompute=recompute, width=width)
        if layer in dense:
            total += mlp_bytes(
                model, ffn_hidden_size=model.dense_ffn_hidden_size, recompute=recompute, width=width
            )
        else:
            total += _ROUTER_BYTES_PER_EXPERT * model.moe.num_experts
            total += mlp_bytes(
                model, ffn_hidden_size=model.moe.shared_ffn_hidden_size, recompute=recompute, width=width
            )
    if stage == model.num_moe_layers:
        total += norm_bytes(model, recompute=Recompute.NONE, width=width)
    return total


def logits_bytes(model: ModelSpec, *, width: int) -> float:
    """Alive in the tail per token: logits and their gradient, and the softmax in fp32."""
    return model.vocab_size * (2 * width + 4)


def expert_input_bytes(model: ModelSpec, *, width: int) -> float:
    """One (token, expert) row as the experts get it."""
    return model.hidden_size * width


def expert_bytes(model: ModelSpec, *, recompute: Recompute, width: int, tensor_parallel: int = 1) -> float:
    """Kept by an expert per (token, expert) row, its input included; the inner tensors are cut ``tensor_parallel``."""
    row = expert_input_bytes(model, width=width) + PAIR_BYTES
    if recompute is Recompute.FULL:
        return row
    inner = mlp_bytes(model, ffn_hidden_size=model.moe.ffn_hidden_size, recompute=recompute, width=width)
    return row + inner / tensor_parallel
