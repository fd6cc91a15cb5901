"""FLOPs of every stage against figures worked out by hand."""

from __future__ import annotations

import pytest

from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.operations import (
    Does,
    expert_operations,
    mean_context,
    model_flops,
    num_flops,
    output_operations,
    stage_operations,
)


def _flops(name: str, *, stage: int, sequence: int = 4096) -> dict[str, float]:
    """FLOPs per token of A(stage) by operation; operations of several layers are added up."""
    found: dict[str, float] = {}
    for each in stage_operations(load_model(name), stage=stage, sequence=sequence):
        if each.does is not Does.MEMORY:
            found[each.name] = found.get(each.name, 0) + each.amount
    return found


def test_grouped_query_attention_and_router_of_qwen3() -> None:
    assert _flops("qwen3-235b-a22b", stage=5) == {
        "qkv projection": 2 * 4096 * (64 + 2 * 4) * 128,
        "core attention": 2 * 2048.5 * 64 * (128 + 128),  # each token attends to (4096 + 1) / 2 on average
        "output projection": 2 * 64 * 128 * 4096,
        "router": 2 * 4096 * 128,
    }


def test_the_output_layer_of_qwen3_weighs_six_attention_stages() -> None:
    model = load_model("qwen3-235b-a22b")
    tail = _flops("qwen3-235b-a22b", stage=94)
    assert tail == {"output layer": 2 * 4096 * 151936}
    attention = num_flops(stage_operations(model, stage=1, sequence=4096))
    assert tail["output layer"] / attention == pytest.approx(5.9, abs=0.05)
    assert num_flops(output_operations(model)) == 1_244_659_712


def test_swiglu_experts_have_three_matrices() -> None:
    assert num_flops(expert_operations(load_model("qwen3-235b-a22b"))) == 3 * 2 * 4096 * 1536
    plain = load_model("quickstart").model_copy(update={"gated": False})
    assert num_flops(expert_operations(plain)) == 2 * 2 * 96 * 192


def test_latent_attention_and_shared_expert_of_deepseek_v3() -> None:
    assert _flops("deepseek-v3", stage=1) == {
        "query down": 2 * 7168 * 1536,
        "query up": 2 * 1536 * 128 * 192,
        "key-value down": 2 * 7168 * (512 + 64),
        "key-value up": 2 * 512 * 128 * (128 + 128),
        "core attention": 2 * 2048.5 * 128 * (192 + 128),
        "output projection": 2 * 128 * 128 * 7168,
        "router": 2 * 7168 * 256,
        "shared experts: in": 2 * 7168 * 2048 * 2,
        "shared experts: out": 2 * 2048 * 7168,
    }


def test_dense_layers_belong_to_the_stage_that_follows_them() -> None:
    first, second = _flops("deepseek-v3", stage=0), _flops("deepseek-v3", stage=1)
    assert first["core attention"] == 4 * second["core attention"]  # layers 0 to 3
    assert first["dense MLP: in"] + first["dense MLP: out"] == 3 * (3 * 2 * 7168 * 18432)
    assert first["router"] == second["router"]


def test_sliding_windows_of_gpt_oss_alternate() -> None:
    window, full = _flops("gpt-oss-120b", stage=0), _flops("gpt-oss-120b", stage=1)
    # the first 128 tokens attend to 1 .. 128 (64.5 on average), the other 3968 to 128
    assert window["core attention"] == 2 * (128 * 64.5 + 3968 * 128) / 4096 * 64 * 128
    assert full["core attention"] == 2 * 2048.5 * 64 * 128


@pytest.mark.parametrize(
    ("sequence", "window", "mean"), [(1, 0, 1.0), (4, 0, 2.5), (4, 2, 1.75), (4, 4, 2.5), (4, 9, 2.5)]
)
def test_mean_context(sequence: int, window: int, mean: float) -> None:
    counted = sum(min(i + 1, window or sequence) for i in range(sequence)) / sequence
    assert mean_context(sequence, window) == mean == counted


@pytest.mark.parametrize("name", ["qwen3-235b-a22b", "deepseek-v3", "mixtral-8x7b"])
def test_model_flops_are_six_per_active_parameter_and_attention(name: str) -> None:
    model = load_model(name)
    a = model.attention
    core = model.num_layers * 2 * mean_context(4096, 0) * a.num_heads * (a.key_dim + a.value_dim)
    met = model.num_active_parameters - model.num_embedding_parameters  # a table is read, not multiplied
    assert model_flops(model, sequence=4096).total == pytest.approx(6 * met + 3 * core, rel=1e-3)
