"""Model descriptions: parameter counts against published ones, import from elsewhere, messages."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_disagmoe.files import shipped_folder
from megatron_disagmoe.planner.files import read_mapping
from megatron_disagmoe.planner.model_import import load_model, model_from_huggingface, model_from_megatron
from megatron_disagmoe.planner.model_spec import ModelSpec

MODELS = ("deepseek-moe-16b", "gpt-oss-120b", "qwen3-235b-a22b", "deepseek-v3", "mixtral-8x7b", "quickstart")
PUBLIC = MODELS[:-1]

QWEN3_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "mlp_only_layers": [],
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "num_key_value_heads": 4,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DEEPSEEK_V3_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GPT_OSS_CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_total_parameters_match_the_published_count_within_one_percent(name: str) -> None:
    model = load_model(name)
    assert model.published is not None
    assert model.num_parameters == pytest.approx(model.published.total_parameters, rel=0.01)


@pytest.mark.parametrize(
    ("name", "active", "with_embedding", "tolerance"),
    [
        ("gpt-oss-120b", 5.13e9, False, 0.01),  # the card leaves the embedding table out
        ("qwen3-235b-a22b", 22e9, True, 0.01),
        ("mixtral-8x7b", 12.9e9, True, 0.01),
        ("deepseek-v3", 37e9, True, 0.016),  # between 36.6 without and 37.6 with the embedding table
        ("deepseek-moe-16b", 2.8e9, True, 0.011),  # published with two digits
    ],
)
def test_active_parameters(name: str, active: float, with_embedding: bool, tolerance: float) -> None:
    model = load_model(name)
    counted = model.num_active_parameters - (0 if with_embedding else model.num_embedding_parameters)
    assert counted == pytest.approx(active, rel=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_model_cites_its_sources(name: str) -> None:
    assert load_model(name).sources


def test_the_six_models_are_shipped() -> None:
    assert {path.stem for path in (shipped_folder("configs") / "models").glob("*.yaml")} == set(MODELS)


@pytest.mark.parametrize(
    ("name", "config"),
    [("qwen3-235b-a22b", QWEN3_CONFIG), ("deepseek-v3", DEEPSEEK_V3_CONFIG), ("gpt-oss-120b", GPT_OSS_CONFIG)],
)
def test_a_hugging_face_config_gives_the_shipped_model(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    imported = load_model(str(folder / "config.json"))
    shipped = load_model(name)
    ignored = {"sources", "published"}
    assert imported.model_dump(exclude=ignored) == shipped.model_dump(exclude=ignored)


def test_megatron_flags_give_the_quickstart_model() -> None:
    flags = shlex.split((shipped_folder("configs") / "runs" / "quickstart.flags").read_text(), comments=True)
    imported = model_from_megatron([*flags, "--padded-vocab-size", "384"], name="quickstart")
    shipped = load_model("quickstart")
    assert imported.model_dump(exclude={"sources"}) == shipped.model_dump(exclude={"sources"})


def test_megatron_flags_of_a_deepseek_like_model() -> None:
    flags = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --multi-latent-attention --kv-lora-rank 16
    --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8 --swiglu --disable-bias-linear --normalization RMSNorm
    --position-embedding-type rope --untie-embeddings-and-output-weights --vocab-size 1000 --num-experts 8
    --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 --ffn-hidden-size 128
    --moe-layer-freq ([0]*1+[1]*3) --tensor-model-parallel-size 2"""
    model = model_from_megatron(flags.split(), name="small")
    assert model.dense_layers == (0,)
    assert model.vocab_size == 1024  # padded to a multiple of 128 * TP
    assert model.stage_layers == ((0, 1), (2,), (3,), ())
    # By hand: attention 64*(4*12) + 64*(16+4) + 16*4*(8+8) + 4*8*64 + 16 (latent norm) + 64 (norm before)
    assert model.num_attention_parameters == 3072 + 1280 + 1024 + 2048 + 16 + 64
    assert model.num_expert_parameters == 3 * 64 * 32


def test_megatron_windows_and_layer_frequency() -> None:
    flags = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --vocab-size 128 --num-experts 2"
    flags += " --max-position-embeddings 32 --window-size 127,0 --window-attn-skip-freq 2 --moe-layer-freq 2"
    model = model_from_megatron(flags.split(), name="small")
    assert [model.attention.window(layer) for layer in range(4)] == [128, 0, 128, 0]
    assert model.moe_layers == (0, 2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -4096}, "hidden_size"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"hidden_size": 1e12}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_layers": 10**9}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"depth": 4}, "depth"),
        ({"dense_layers": [94]}, "dense_layers"),
        ({"dense_layers": [0]}, "dense_ffn_hidden_size"),
        ({"attention": {"kind": "gqa", "num_heads": 64, "num_query_groups": 5, "head_dim": 128}}, "num_query_groups"),
        ({"attention": {"kind": "linear"}}, "attention"),
        ({"moe": {"num_experts": 8, "top_k": 9, "ffn_hidden_size": 8}}, "top_k"),
        ({"moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 8, "num_groups": 3}}, "num_groups"),
    ],
)
def test_a_bad_model_names_the_field(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    import yaml

    content = read_mapping(shipped_folder("configs") / "models" / "qwen3-235b-a22b.yaml")
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(content | change))
    with pytest.raises(ValueError, match=field) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not valid YAML at line"),
        ("just words", "neither a model description"),
        ("--num-layers four --hidden-size 8 --num-experts 2", "--num-layers: a whole number"),
        ("--num-layers 4 --num-experts 2", "--hidden-size: missing"),
        (
            "--num-layers 4 --hidden-size 8 --num-attention-heads 2 --vocab-size 9 --position-embedding-type rope",
            "num-e",
        ),
        ('{"model_type": "llama", "num_hidden_layers": 2}', "no mixture of experts"),
        ("--num-layers 2 --data-path 'here", "not a list of flags: No closing quotation"),
    ],
)
def test_a_bad_file_says_why(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(str(path))


def test_an_unknown_name_lists_what_is_shipped() -> None:
    with pytest.raises(ValueError, match="qwen3-235b-a22b"):
        load_model("gpt-5")


def test_a_layer_frequency_is_not_evaluated_as_code() -> None:
    flags = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --num-experts 2 --moe-layer-freq __import__('os')"
    with pytest.raises(ValueError, match="moe-layer-freq"):
        model_from_megatron(flags.split(), name="bad")


def test_the_model_needs_an_moe_layer() -> None:
    content = load_model("quickstart").model_dump(mode="json")
    content |= {"dense_layers": [0, 1, 2, 3], "dense_ffn_hidden_size": 8}
    with pytest.raises(ValueError, match="no MoE layer"):
        ModelSpec.model_validate(content)


def test_a_config_without_heads_names_the_field() -> None:
    config = {key: value for key, value in QWEN3_CONFIG.items() if key != "num_attention_heads"}
    with pytest.raises(ValueError, match="num_attention_heads: missing"):
        model_from_huggingface(config, name="qwen")


BAD_VALUES: tuple[Any, ...] = ("many", -1, 0, 1.5, 10**12, float("nan"), float("inf"), [], [[]], {}, True)
#: What may be written beside numbers, or may be empty or zero.
LENIENT = {"architectures", "model_type", "tie_word_embeddings", "use_sliding_window", "topk_method", "attention_bias"}


def _refusal(imported: Callable[..., ModelSpec], described: object) -> str:
    """What is said of a bad description; empty where it is taken."""
    try:
        imported(described, name="bad")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("config", [QWEN3_CONFIG, DEEPSEEK_V3_CONFIG, GPT_OSS_CONFIG], ids=lambda c: c["model_type"])
def test_nothing_in_a_hugging_face_config_breaks_the_import(config: dict[str, Any]) -> None:
    """Whatever a field holds, the import takes it or names that field; nothing is computed with an absurd number."""
    refused = 0
    for field in config.keys() - LENIENT:
        for value in BAD_VALUES:
            said = _refusal(model_from_huggingface, config | {field: value})
            refused += bool(said)
            assert not said or any(name in said for name in (field, "moe", "dense_layers", "num_query_groups")), said
    assert refused > 0.7 * len(config.keys() - LENIENT) * len(BAD_VALUES)


def test_an_unknown_kind_of_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="layer_types.*'linear_attention' among them"):
        model_from_huggingface(GPT_OSS_CONFIG | {"layer_types": ["linear_attention"] * 36}, name="next")
    with pytest.raises(ValueError, match=r"layer_types.*36 layers.*got 2 entries"):
        model_from_huggingface(GPT_OSS_CONFIG | {"layer_types": ["full_attention"] * 2}, name="short")


MEGATRON_FLAGS = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --kv-channels 16 --vocab-size 1000 --make-vocab-size-divisible-by 128 --tensor-model-parallel-size 1
    --max-position-embeddings 32 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32 --ffn-hidden-size 128
    --moe-shared-expert-intermediate-size 32 --moe-router-num-groups 2 --moe-router-group-topk 2 --window-size 7,0
    --window-attn-skip-freq 2 --moe-layer-freq 2""".split()


def test_nothing_in_megatron_flags_breaks_the_import() -> None:
    """As above, for the values of a training command."""
    model_from_megatron(MEGATRON_FLAGS, name="good")
    refused = 0
    for at, flag in enumerate(MEGATRON_FLAGS):
        if not flag.startswith("--") or flag == "--group-query-attention":
            continue
        for value in ("many", "-1", "0", "1.5", "1000000000000", "nan", "inf", "[]", "[[]]", "([0]*99999999999)"):
            words = list(MEGATRON_FLAGS)
            words[at + 1] = value
            said = _refusal(model_from_megatron, words)
            refused += bool(said)
            plain = flag.removeprefix("--").replace("-", "_")
            named = (flag, plain, "moe", "num_query_groups", "sliding_windows", "dense_layers")
            assert not said or any(name in said for name in named), said
    assert refused > 120
