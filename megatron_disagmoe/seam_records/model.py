"""What is used as it is: the model's builder looks all of it up before it builds."""

from __future__ import annotations

from megatron_disagmoe.seam_records.record import PARITY, Seam

_STAGE = "megatron_disagmoe.model.stages"
_PUBLIC = "it becomes public"
_LAYER = "megatron.core.transformer.transformer_layer:TransformerLayer"
_GPT = "megatron.core.models.gpt.gpt_model:GPTModel"
_MOE = "megatron.core.transformer.moe.moe_layer:MoELayer"
_MPU = "megatron.core.parallel_state"

CALLED = (
    Seam(
        f"{_LAYER}._forward_attention",
        "an attention stage ends before the MoE layer's experts",
        _STAGE,
        PARITY,
        _PUBLIC,
        takes=("hidden_states", "attention_mask", "rotary_pos_emb"),
    ),
    Seam(
        f"{_LAYER}._forward_pre_mlp_layernorm",
        "likewise: the norm whose output is routed",
        _STAGE,
        PARITY,
        _PUBLIC,
        takes=("hidden_states",),
    ),
    Seam(
        f"{_GPT}._preprocess",
        "the embedding and the rotary angles, without the layers",
        _STAGE,
        PARITY,
        _PUBLIC,
        takes=("input_ids", "position_ids", "decoder_input"),
    ),
    Seam(
        f"{_GPT}._postprocess",
        "the output layer and the loss per token, without the layers",
        _STAGE,
        PARITY,
        _PUBLIC,
        takes=("hidden_states", "labels", "loss_mask"),
    ),
    Seam(f"{_MOE}.route", "the router alone", _STAGE, PARITY, "never: it is cut to be called"),
    Seam(
        f"{_MOE}.shared_experts_compute", "run while the dispatch travels", _STAGE, PARITY, "never: likewise"
    ),
    *(
        Seam(
            f"{_MPU}:{name}",
            "FFN ranks count batches as the attention side does",
            "megatron_disagmoe.parallel_state",
            PARITY,
            "initialize_megatron takes process groups",
        )
        for name in ("_MPU_DATA_PARALLEL_WORLD_SIZE", "_MPU_DATA_PARALLEL_RANK")
    ),
    *(
        Seam(
            f"{_MPU}:{name}",
            "a tied weight has its two ends on two attention groups",
            "megatron_disagmoe.parallel_state",
            PARITY,
            "initialize_megatron takes process groups",
        )
        for name in ("_EMBEDDING_GROUP", "_EMBEDDING_GLOBAL_RANKS")
    ),
)
