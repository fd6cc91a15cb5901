"""The operations of each stage with their exact FLOPs, per token of one layer.

Legend: h hidden, H query heads, K key/value heads, d head, E experts, k top-k, f expert hidden, V vocabulary.
A matrix product costs 2 FLOPs per weight and token; its backward two products of the same size. Attention costs
``2 c H (d_qk + d_v)`` FLOPs, c the mean number of positions a token attends to (causal: (s + 1) / 2).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from megatron_disagmoe.planner.arrays import Floats
from megatron_disagmoe.planner.model_spec import LatentAttention, ModelSpec

#: A fused backward computes the scores again: five products where forward has two (Dao, arXiv 2205.14135, 2307.08691).
ATTENTION_BACKWARD = 2.5


class Does(enum.Enum):
    """What limits an operation."""

    GEMM = "gemm"
    CORE = "core"
    MEMORY = "memory"


class Again(enum.IntEnum):
    """From which level of recomputation on an operation's forward is run again before its backward."""

    NEVER = 3
    WITH_FULL = 2
    WITH_SELECTIVE = 1


@dataclass(frozen=True)
class Operation:
    """``amount``: forward FLOPs per token, or for MEMORY numbers read and written per token.

    ``backward``: its backward as a multiple of ``amount``. ``again``: see ``Again``.
    """

    name: str
    does: Does
    amount: float
    backward: float = 2.0
    again: Again = Again.WITH_FULL


def mean_context(sequence: int, window: int) -> float:
    """Mean number of positions a token of a causal sequence attends to, itself included.

    ``window`` tokens at most where it is not 0: (w (w + 1) / 2 + (s - w) w) / s.
    """
    if window == 0 or window >= sequence:
        return (sequence + 1) / 2
    return (window * (window + 1) / 2 + (sequence - window) * window) / sequence


def attention_operations(model: ModelSpec, *, layer: int, sequence: int) -> tuple[Operation, ...]:
    """Input norm, projections, attention and residual of one layer."""
    h, attention = model.hidden_size, model.attention
    heads = attention.num_heads
    context = mean_context(sequence, attention.window(layer))
    core = 2 * context * heads * (attention.key_dim + attention.value_dim)
    return (
        Operation("input norm", Does.MEMORY, 2 * h, 1.5, Again.WITH_SELECTIVE),
        *_projections(model),
        Operation("core attention", Does.CORE, core, ATTENTION_BACKWARD),
        Operation("output projection", Does.GEMM, 2 * heads * attention.value_dim * h),
        Operation("residual", Does.MEMORY, 3 * h, 1.0),
    )


def _projections(model: ModelSpec) -> tuple[Operation, ...]:
    h, attention = model.hidden_size, model.attention
    heads, key = attention.num_heads, attention.key_dim
    if isinstance(attention, LatentAttention):
        up = attention.kv_lora_rank * heads * (attention.qk_head_dim + attention.v_head_dim)
        queries: tuple[Operation, ...] = (Operation("query projection", Does.GEMM, 2 * h * heads * key),)
        if attention.q_lora_rank:
            queries = (
                Operation("query down", Does.GEMM, 2 * h * attention.q_lora_rank),
                Operation("query up", Does.GEMM, 2 * attention.q_lora_rank * heads * key, again=Again.WITH_SELECTIVE),
            )
        return (
            *queries,
            Operation("key-value down", Does.GEMM, 2 * h * (attention.kv_lora_rank + attention.qk_rope_dim)),
            Operation("latent norms", Does.MEMORY, 2 * (attention.q_lora_rank + attention.kv_lora_rank), 1.5),
            Operation("key-value up", Does.GEMM, 2 * up, again=Again.WITH_SELECTIVE),
            Operation("rotary", Does.MEMORY, 4 * heads * key, 1.0, Again.WITH_SELECTIVE),
        )
    groups = attention.num_query_groups
    rotated = (heads + groups) * key * (2 if attention.qk_norm else 1)
    return (
        Operation("qkv projection", Does.GEMM, 2 * h * (heads + 2 * groups) * key),
        Operation("rotary", Does.MEMORY, 2 * rotated, 1.0),
    )


def moe_dense_operations(model: ModelSpec) -> tuple[Operation, ...]:
    """What stays on the A side of an MoE layer: norm, router, shared experts."""
    h, moe = model.hidden_size, model.moe
    operations = [
        Operation("pre-MLP norm", Does.MEMORY, 2 * h, 1.5, Again.WITH_SELECTIVE),
        Operation("router", Does.GEMM, 2 * h * moe.num_experts),
        Operation("top-k", Does.MEMORY, 4 * moe.num_experts, 1.0),
    ]
    if moe.shared_ffn_hidden_size:
        operations += mlp_operations(model, ffn_hidden_size=moe.shared_ffn_hidden_size, name="shared experts")
        operations += [Operation("shared gate", Does.GEMM, 2 * h)] if moe.shared_gate else []
    return tuple(operations)


def combine_operations(model: ModelSpec) -> tuple[Operation, ...]:
    """What A(i) does first: adds residual, experts' output and shared experts' output of layer i - 1.

    Its result is what a recomputed stage begins with, so it is never run again.
    """
    numbers = (3 + bool(model.moe.shared_ffn_hidden_size)) * model.hidden_size
    return (Operation("combine", Does.MEMORY, numbers, 1.0, Again.NEVER),)


def packing_numbers(model: ModelSpec, *, copies: Floats) -> Floats:
    """Numbers an A rank reads and writes per token and layer to send ``copies`` rows of it and to add up what returns.

    Charged whole to A(i), i < L: packing belongs there, unpacking to A(i + 1), which is as good as even.
    """
    return 2 * (1 + copies) * model.hidden_size


def dense_mlp_operations(model: ModelSpec) -> tuple[Operation, ...]:
    """The MLP of a dense layer with its norm and residual."""
    h = model.hidden_size
    return (
        Operation("pre-MLP norm", Does.MEMORY, 2 * h, 1.5, Again.WITH_SELECTIVE),
        *mlp_operations(model, ffn_hidden_size=model.dense_ffn_hidden_size, name="dense MLP"),
        Operation("residual", Does.MEMORY, 3 * h, 1.0),
    )


def mlp_operations(model: ModelSpec, *, ffn_hidden_size: int, name: str) -> tuple[Operation, ...]:
    """Two products and an activation; with a gate the first is twice as wide.

    The second product is run again only where the whole stage is.
    """
    inner = model.matrices_per_mlp - 1
    return (
        Operation(f"{name}: in", Does.GEMM, 2 * model.hidden_size * ffn_hidden_size * inner),
        Operation(f"{name}: activation", Does.MEMORY, (inner + 1) * ffn_hidden_size, 1.5, Again.WITH_SELECTIVE),
        Operation(f"{name}: out", Does.GEMM, 2 * ffn_hidden_size * model.hidden_size),
    )


def expert_operations(model: ModelSpec) -> tuple[Operation, ...]:
    """One routed expert, per (token, expert) row: rows into expert order, the MLP, rows back."""
    h = model.hidden_size
    return (
        Operation("rows to experts", Does.MEMORY, 2 * h, 1.0),
        *mlp_operations(model, ffn_hidden_size=model.moe.ffn_hidden_size, name="experts"),
        Operation("rows back", Does.MEMORY, 2 * h, 1.0, Again.NEVER),
    )


def embedding_operations(model: ModelSpec) -> tuple[Operation, ...]:
    return (Operation("embedding", Does.MEMORY, 2 * model.hidden_size, 2.0, Again.NEVER),)


def output_operations(model: ModelSpec) -> tuple[Operation, ...]:
    """Final norm, output layer, loss; never recomputed, its backward follows at once."""
    return (
        Operation("final norm", Does.MEMORY, 2 * model.hidden_size, 1.5, Again.NEVER),
        Operation("output layer", Does.GEMM, 2 * model.hidden_size * model.vocab_size, again=Again.NEVER),
        Operation("cross entropy", Does.MEMORY, 4 * model.vocab_size, 0.5, Again.NEVER),
    )


def stage_operations(model: ModelSpec, *, stage: int, sequence: int) -> tuple[Operation, ...]:
    """Everything of A(stage), 0 <= stage <= L, but packing; embedding in A(0), output layer and loss in the tail."""
    operations = list(combine_operations(model) if stage else embedding_operations(model))
    dense = set(model.dense_layers)
    for layer in model.stage_layers[stage]:
        operations += attention_operations(model, layer=layer, sequence=sequence)
        operations += dense_mlp_operations(model) if layer in dense else moe_dense_operations(model)
    if stage == model.num_moe_layers:
        operations += output_operations(model)
    return tuple(operations)


def num_flops(operations: tuple[Operation, ...]) -> float:
    """Forward FLOPs per token."""
    return sum(each.amount for each in operations if each.does is not Does.MEMORY)


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs per token of a whole model; backward is twice that (model FLOPs: attention counted 2, not 2.5)."""

    attention_side: float
    ffn_side: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return 3 * (self.attention_side + self.ffn_side)


def model_flops(model: ModelSpec, *, sequence: int) -> ModelFlops:
    """Exact model FLOPs per token at a sequence length."""
    stages = range(model.num_moe_layers + 1)
    a_side = sum(num_flops(stage_operations(model, stage=stage, sequence=sequence)) for stage in stages)
    f_side = model.num_moe_layers * model.moe.top_k * num_flops(expert_operations(model))
    return ModelFlops(a_side, f_side)
