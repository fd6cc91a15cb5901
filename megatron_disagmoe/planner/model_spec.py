"""What the planner needs to know of a model: sizes, nothing learned.

Legend: h hidden, d head, H query heads, K key/value heads, E experts, k top-k, f expert hidden, V vocabulary.
Parameter counts follow Megatron-LM's modules; ``tests/planner/test_models.py`` holds them against published totals.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_disagmoe.planner.files import Count, CountOrZero, QuantityOrZero, Strict


class GroupedQueryAttention(Strict):
    """Multi-head, multi-query or grouped-query attention (Ainslie et al., arXiv 2305.13245).

    ``sliding_windows`` gives each layer's window in tokens, 0 for full attention, repeated over the layers.
    """

    kind: Literal["gqa"] = "gqa"
    num_heads: Count
    num_query_groups: Count
    head_dim: Count
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    sliding_windows: tuple[CountOrZero, ...] = (0,)

    @model_validator(mode="after")
    def _groups_divide_heads(self) -> Self:
        if self.num_heads % self.num_query_groups:
            raise ValueError(f"num_query_groups {self.num_query_groups} must divide num_heads {self.num_heads}")
        if not self.sliding_windows:
            raise ValueError("sliding_windows needs at least one entry; [0] is full attention everywhere")
        return self

    @property
    def key_dim(self) -> int:
        return self.head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim

    @property
    def tensor_parallel_limit(self) -> int:
        """Most ranks that attention can be cut over without copying key/value heads."""
        return self.num_query_groups

    def num_matrix_parameters(self, hidden: int) -> int:
        """Weights that multiply tokens: 2 FLOPs each per token."""
        wide = self.num_heads * self.head_dim
        return hidden * (2 * wide + 2 * self.num_query_groups * self.head_dim)

    def num_other_parameters(self, hidden: int) -> int:
        qkv = (self.num_heads + 2 * self.num_query_groups) * self.head_dim
        return (
            qkv * self.qkv_bias
            + hidden * self.output_bias
            + 2 * self.head_dim * self.qk_norm
            + self.num_heads * self.sinks
        )

    def window(self, layer: int) -> int:
        """Sliding window of ``layer``; 0 where it attends to everything before."""
        return self.sliding_windows[layer % len(self.sliding_windows)]


class LatentAttention(Strict):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kind: Literal["mla"]
    num_heads: Count
    q_lora_rank: CountOrZero = 0
    kv_lora_rank: Count
    qk_head_dim: Count
    qk_rope_dim: Count
    v_head_dim: Count

    @property
    def key_dim(self) -> int:
        return self.qk_head_dim + self.qk_rope_dim

    @property
    def value_dim(self) -> int:
        return self.v_head_dim

    @property
    def num_query_groups(self) -> int:
        """In training keys and values are expanded to every head."""
        return self.num_heads

    @property
    def tensor_parallel_limit(self) -> int:
        return self.num_heads

    def num_matrix_parameters(self, hidden: int) -> int:
        queries = self.num_heads * self.key_dim
        q = hidden * self.q_lora_rank + self.q_lora_rank * queries if self.q_lora_rank else hidden * queries
        kv = hidden * (self.kv_lora_rank + self.qk_rope_dim)
        kv += self.kv_lora_rank * self.num_heads * (self.qk_head_dim + self.v_head_dim)
        return q + kv + self.num_heads * self.v_head_dim * hidden

    def num_other_parameters(self, hidden: int) -> int:
        del hidden
        return self.q_lora_rank + self.kv_lora_rank

    def window(self, layer: int) -> int:
        del layer
        return 0


Attention = Annotated[GroupedQueryAttention | LatentAttention, Field(discriminator="kind")]


class MixtureOfExperts(Strict):
    """The routed and shared experts of one MoE layer.

    ``num_groups`` and ``topk_groups`` describe group-limited routing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2):
    a token picks its experts from ``topk_groups`` of ``num_groups`` equal groups.
    """

    num_experts: Count
    top_k: Count
    ffn_hidden_size: Count
    shared_ffn_hidden_size: CountOrZero = 0
    shared_gate: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    num_groups: Count = 1
    topk_groups: Count = 1

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups {self.num_groups} must divide num_experts {self.num_experts}")
        if self.topk_groups > self.num_groups:
            raise ValueError(f"topk_groups {self.topk_groups} exceeds num_groups {self.num_groups}")
        if self.top_k > self.topk_groups * self.num_experts // self.num_groups:
            raise ValueError(f"top_k {self.top_k} does not fit {self.topk_groups} of {self.num_groups} expert groups")
        return self


class Published(Strict):
    """What the model's makers say of its size; only tests read it."""

    total_parameters: QuantityOrZero
    active_parameters: QuantityOrZero = 0
    source: str


class ModelSpec(Strict):
    """A mixture-of-experts GPT. ``dense_layers`` are the (global, 0-based) layers without experts."""

    name: str = Field(min_length=1)
    sources: tuple[str, ...] = ()
    num_layers: Annotated[Count, Field(le=1000)]
    hidden_size: Annotated[Count, Field(le=10_000_000)]
    vocab_size: Count
    tied_embeddings: bool = False
    learned_positions: CountOrZero = 0
    gated: bool = True
    layer_norm: bool = False
    linear_bias: bool = False
    dense_ffn_hidden_size: CountOrZero = 0
    dense_layers: tuple[CountOrZero, ...] = ()
    attention: Attention
    moe: MixtureOfExperts
    published: Published | None = None

    @model_validator(mode="after")
    def _layers_exist(self) -> Self:
        different = len(set(self.dense_layers)) == len(self.dense_layers)
        if not different or max(self.dense_layers, default=0) >= self.num_layers:
            raise ValueError(f"dense_layers {list(self.dense_layers)} must be different layers below {self.num_layers}")
        if len(self.dense_layers) == self.num_layers:
            raise ValueError("there is no MoE layer: nothing to put on FFN ranks")
        if self.dense_layers and not self.dense_ffn_hidden_size:
            raise ValueError("dense_ffn_hidden_size is needed where there are dense_layers")
        return self

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Global numbers of the MoE layers."""
        dense = set(self.dense_layers)
        return tuple(i for i in range(self.num_layers) if i not in dense)

    @property
    def num_moe_layers(self) -> int:
        """L."""
        return len(self.moe_layers)

    @cached_property
    def stage_layers(self) -> tuple[tuple[int, ...], ...]:
        """Global layers whose attention runs in A(i), 0 <= i <= L: dense layers belong to the stage that follows."""
        stages: list[tuple[int, ...]] = []
        waiting: list[int] = []
        dense = set(self.dense_layers)
        for layer in range(self.num_layers):
            waiting.append(layer)
            if layer not in dense:
                stages.append(tuple(waiting))
                waiting = []
        return (*stages, tuple(waiting))

    @property
    def matrices_per_mlp(self) -> int:
        """3 with a gate (SwiGLU), else 2."""
        return 3 if self.gated else 2

    def num_norm_parameters(self) -> int:
        """Of one normalisation."""
        return self.hidden_size * (2 if self.layer_norm else 1)

    def num_mlp_parameters(self, ffn_hidden_size: int, *, bias: bool) -> int:
        """Of one MLP or expert."""
        weights = self.matrices_per_mlp * self.hidden_size * ffn_hidden_size
        return weights + bias * ((self.matrices_per_mlp - 1) * ffn_hidden_size + self.hidden_size)

    @property
    def num_expert_parameters(self) -> int:
        """Of one routed expert."""
        return self.num_mlp_parameters(self.moe.ffn_hidden_size, bias=self.moe.expert_bias)

    @property
    def num_attention_parameters(self) -> int:
        """Of one layer's attention with the norm before it."""
        return (
            self.attention.num_matrix_parameters(self.hidden_size)
            + self.attention.num_other_parameters(self.hidden_size)
            + self.num_norm_parameters()
        )

    @property
    def num_moe_dense_parameters(self) -> int:
        """Of one MoE layer's norm, router and shared experts: what stays on the A side beside attention."""
        moe, h = self.moe, self.hidden_size
        shared = self.num_mlp_parameters(moe.shared_ffn_hidden_size, bias=False) if moe.shared_ffn_hidden_size else 0
        router = moe.num_experts * (h + moe.router_bias)
        return self.num_norm_parameters() + router + shared + h * moe.shared_gate

    @property
    def num_dense_mlp_parameters(self) -> int:
        """Of one dense layer's MLP with the norm before it."""
        return self.num_norm_parameters() + self.num_mlp_parameters(self.dense_ffn_hidden_size, bias=self.linear_bias)

    def num_stage_parameters(self, stage: int) -> int:
        """Of A(stage) without embedding, final norm and output layer."""
        layers = self.stage_layers[stage]
        dense = len(layers) - (stage < self.num_moe_layers)
        return (
            len(layers) * self.num_attention_parameters
            + dense * self.num_dense_mlp_parameters
            + (stage < self.num_moe_layers) * self.num_moe_dense_parameters
        )

    @property
    def num_embedding_parameters(self) -> int:
        return (self.vocab_size + self.learned_positions) * self.hidden_size

    @property
    def num_output_parameters(self) -> int:
        """Final norm and output layer; a tied output layer adds no weights of its own."""
        return self.num_norm_parameters() + (0 if self.tied_embeddings else self.vocab_size * self.hidden_size)

    @property
    def num_parameters(self) -> int:
        stages = sum(self.num_stage_parameters(stage) for stage in range(self.num_moe_layers + 1))
        experts = self.num_moe_layers * self.moe.num_experts * self.num_expert_parameters
        return self.num_embedding_parameters + stages + experts + self.num_output_parameters

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets, embedding table included (as most model cards count)."""
        idle = self.num_moe_layers * (self.moe.num_experts - self.moe.top_k) * self.num_expert_parameters
        return self.num_parameters - idle
