"""A model as flags of a Megatron-LM 0.19 training command; ``model_import.model_from_megatron`` reads them back."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_disagmoe.planner.model_spec import LatentAttention, ModelSpec


def megatron_model_flags(model: ModelSpec, *, sequence_length: int) -> list[str]:
    """The flags. Vocabulary sizes are given without padding; attention sinks and windows need Transformer Engine."""
    return [word for flag in _flags(model, sequence_length) for word in flag]


def _flags(model: ModelSpec, sequence_length: int) -> Iterator[tuple[str, ...]]:
    moe = model.moe
    yield "--num-layers", str(model.num_layers)
    yield "--hidden-size", str(model.hidden_size)
    yield "--vocab-size", str(model.vocab_size)
    yield "--max-position-embeddings", str(model.learned_positions or sequence_length)
    if not model.learned_positions:
        yield "--position-embedding-type", "rope"
    yield "--normalization", "LayerNorm" if model.layer_norm else "RMSNorm"
    if model.gated:
        yield ("--swiglu",)
    if not model.linear_bias and not moe.expert_bias:
        yield ("--disable-bias-linear",)
    if not model.tied_embeddings:
        yield ("--untie-embeddings-and-output-weights",)
    yield from _attention(model)
    yield "--num-experts", str(moe.num_experts)
    yield "--moe-router-topk", str(moe.top_k)
    yield "--moe-ffn-hidden-size", str(moe.ffn_hidden_size)
    yield "--ffn-hidden-size", str(model.dense_ffn_hidden_size or moe.ffn_hidden_size)
    if moe.shared_ffn_hidden_size:
        yield "--moe-shared-expert-intermediate-size", str(moe.shared_ffn_hidden_size)
    if moe.shared_gate:
        yield ("--moe-shared-expert-gate",)
    if moe.num_groups > 1:
        yield "--moe-router-num-groups", str(moe.num_groups)
        yield "--moe-router-group-topk", str(moe.topk_groups)
    if model.dense_layers:
        dense = set(model.dense_layers)
        yield "--moe-layer-freq", str([int(i not in dense) for i in range(model.num_layers)]).replace(" ", "")


def _attention(model: ModelSpec) -> Iterator[tuple[str, ...]]:
    attention = model.attention
    yield "--num-attention-heads", str(attention.num_heads)
    if isinstance(attention, LatentAttention):
        yield ("--multi-latent-attention",)
        if attention.q_lora_rank:
            yield "--q-lora-rank", str(attention.q_lora_rank)
        yield "--kv-lora-rank", str(attention.kv_lora_rank)
        yield "--qk-head-dim", str(attention.qk_head_dim)
        yield "--qk-pos-emb-head-dim", str(attention.qk_rope_dim)
        yield "--v-head-dim", str(attention.v_head_dim)
        return
    yield "--kv-channels", str(attention.head_dim)
    if attention.num_query_groups < attention.num_heads:
        yield ("--group-query-attention",)
        yield "--num-query-groups", str(attention.num_query_groups)
    if attention.qk_norm:
        yield ("--qk-layernorm",)
    if attention.qkv_bias and not attention.output_bias:
        yield ("--add-qkv-bias",)
    windows = [window for window in attention.sliding_windows if window]
    if windows:
        yield "--window-size", f"{windows[0] - 1},0"
        if len(attention.sliding_windows) > 1:
            yield "--window-attn-skip-freq", str([int(bool(w)) for w in attention.sliding_windows]).replace(" ", "")
