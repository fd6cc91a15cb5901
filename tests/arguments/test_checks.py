"""Bad input, one table: what is wrong, and that the message has the numbers and the remedy."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_disagmoe import arguments, builders
from megatron_disagmoe.schedules import text
from megatron_disagmoe.schedules.actions import Placement

#: As Megatron's parser leaves them, where a check looks at them.
MEGATRON = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 32,
    "step_batch_size_schedule": None,
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_layer_freq": 1,
    "expert_model_parallel_size": 1,
    "optimizer": "adam",
    "ckpt_format": "torch_dist",
    "use_distributed_optimizer": False,
    "dist_ckpt_optim_fully_reshardable": False,
}


def parsed(words: str, **megatron: Any) -> argparse.Namespace:
    """The namespace of a command line: ``words`` are its AF flags, ``megatron`` what its other flags set."""
    parser = arguments.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return argparse.Namespace(**(MEGATRON | megatron), **vars(parser.parse_args(words.split())))


def errors(words: str, *, world_size: int = 2, **megatron: Any) -> list[str]:
    return arguments.check(parsed(words, **megatron), world_size)


@pytest.mark.parametrize(
    "words, world_size, megatron",
    [
        ("", 7, {}),  # plain Megatron: not our business
        ("--af-pipe", 2, {}),
        ("--af-pipe --af-attention-groups 2", 4, {}),
        ("--af-pipe --af-attention-groups 2 --af-ffn-groups 1", 3, {}),
        ("--af-pipe --af-attention-ranks 3 --af-ffn-ranks 4", 7, {"global_batch_size": 24}),
        ("--af-pipe --af-attention-groups 2 --af-attention-ranks 2", 12, {"global_batch_size": 16}),  # R = 2
        ("--af-pipe --af-schedule sequential --af-dispatch per-expert --af-init local", 2, {}),
        ("--af-pipe", 2, {"global_batch_size": None}),  # one micro-batch
        ("--af-pipe", 2, {"moe_layer_freq": [0, 1, 1, 1]}),
        ("--af-pipe --af-attention-ranks 2", 3, {"expert_model_parallel_size": 2}),
        ("--af-pipe", 2, {"step_batch_size_schedule": "0:8 1.5K:4 2B:16", "global_batch_size": None}),
        ("--af-pipe", 2, {"ckpt_format": "torch"}),  # it neither saves nor loads
    ],
)
def test_good_input(words: str, world_size: int, megatron: dict[str, Any]) -> None:
    assert errors(words, world_size=world_size, **megatron) == []


@pytest.mark.parametrize(
    "words, world_size, megatron, messages",
    [
        ("--af-attention-groups 1", 2, {}, [r"--af-attention-groups without --af-pipe: add --af-pipe, or drop"]),
        (
            "--af-dispatch per-rank --af-timeout-seconds 5",
            2,
            {},
            [r"--af-dispatch, --af-timeout-seconds without --af-pipe"],
        ),
        # sizes and world
        ("--af-pipe", 3, {}, [r"3 processes .* 1 attention groups x 1 \+ 1 FFN groups x 1 = 2 .* multiple of 2"]),
        ("--af-pipe --af-attention-groups 2", 2, {}, [r"2 processes .* = 4 processes; start a multiple of 4"]),
        ("--af-pipe --af-attention-groups 5", 10, {}, [r"--af-attention-groups 5 does not fit 4 MoE layers.*1 and 4"]),
        ("--af-pipe --af-ffn-groups 3", 4, {"moe_layer_freq": 2}, [r"--af-ffn-groups 3 does not fit 2 MoE layers"]),
        ("--af-pipe --af-ffn-ranks 3", 4, {}, [r"--num-experts 8 does not divide over --af-ffn-ranks 3: .* of 8"]),
        ("--af-pipe --af-attention-groups 0", 2, {}, [r"--af-attention-groups must be at least 1, got 0"]),
        (
            "--af-pipe --af-ffn-ranks -1 --af-ranks-per-node 0",
            2,
            {},
            [r"--af-ffn-ranks must be at least 1, got -1", r"--af-ranks-per-node must be at least 1, got 0"],
        ),
        ("--af-pipe --af-timeout-seconds 0", 2, {}, [r"--af-timeout-seconds must be positive and finite, got 0.0"]),
        ("--af-pipe --af-timeout-seconds nan", 2, {}, [r"--af-timeout-seconds must be positive and finite, got nan"]),
        ("--af-pipe --af-timeout-seconds inf", 2, {}, [r"--af-timeout-seconds must be positive and finite, got inf"]),
        # model
        ("--af-pipe", 2, {"num_experts": None}, [r"mixture-of-experts GPT, and --num-experts is not set"]),
        ("--af-pipe", 2, {"num_layers": None, "seq_length": None}, [r"--num-layers, --seq-length is not set"]),
        ("--af-pipe", 2, {"moe_layer_freq": [0, 0, 0, 0]}, [r"--moe-layer-freq leaves no MoE layer"]),
        ("--af-pipe", 2, {"moe_layer_freq": [0, 1]}, [r"--moe-layer-freq lists 2 layers but --num-layers is 4"]),
        ("--af-pipe", 2, {"moe_router_topk": 9}, [r"--moe-router-topk 9 is more than --num-experts 8"]),
        # batches: M*R = 2 and then 4
        ("--af-pipe --af-attention-ranks 2", 3, {"global_batch_size": 6}, [r"--global-batch-size 6 .* multiple of 4"]),
        ("--af-pipe", 8, {"global_batch_size": 4}, [r"size 4 is not a multiple of 8 = --micro-batch-size 2 x 4 att"]),
        (
            "--af-pipe",
            2,
            {"step_batch_size_schedule": "0:3 100:8 1K:1", "global_batch_size": None},
            [r"schedule, size 3 is not a multiple of 2", r"schedule, size 1 is not a multiple of 2"],
        ),
        # vanilla's initialisation
        ("--af-pipe", 2, {"expert_model_parallel_size": 3}, [r"--expert-model-parallel-size 3 .*divide the 8 experts"]),
        # choices
        ("--af-pipe --af-transport mpi", 2, {}, [r"--af-transport 'mpi': choose from torch, nixl"]),
        ("--af-pipe --af-dispatch all", 2, {}, [r"--af-dispatch 'all': choose from per-expert, per-rank, per-node"]),
        ("--af-pipe --af-init zeros", 2, {}, [r"--af-init 'zeros': choose from replay, local"]),
        ("--af-pipe --af-schedule best", 2, {}, [r"--af-schedule 'best' is neither one of .*sequential nor a file"]),
        ("--af-pipe --af-recompute all", 2, {}, [r"--af-recompute 'all': choose from none, attention, ffn, both"]),
        ("--af-pipe --af-wire-dtype fp4", 2, {}, [r"--af-wire-dtype 'fp4': choose from same, bf16, fp8"]),
        # layers
        ("--af-pipe --af-place-layers evenly", 2, {}, [r"--af-place-layers 'evenly' is no list of groups"]),
        ("--af-pipe --af-place-layers 0,0", 2, {}, [r"--af-place-layers '0,0' places 2 attention stages, but 4 MoE"]),
        ("--af-pipe --af-place-layers 0,1,0,1,0", 2, {}, [r"--af-place-layers attention group 1 does not exist"]),
        ("--af-pipe --af-attention-groups 2 --af-place-layers (0)*5", 4, {}, [r"group A1 holds no stage of 4 MoE"]),
        ("--af-pipe --af-tail-weight -1", 2, {}, [r"--af-tail-weight must be positive and finite, got -1.0"]),
        # features
        (
            "--af-pipe --af-schedule split-backward",
            2,
            {"transformer_impl": "transformer_engine"},
            [r"--af-schedule split-backward splits backwards, .* add --transformer-impl local"],
        ),
        ("--af-pipe", 2, {"optimizer": "muon"}, [r"--optimizer is not supported .* choose from adam, sgd"]),
        ("--af-pipe", 2, {"save": "x", "ckpt_format": "torch"}, [r"--ckpt-format is not .* writes torch_dist"]),
        (
            "--af-pipe",
            2,
            {"load": "x", "use_distributed_optimizer": True},
            [r"dp_reshardable format is not .* add --dist-ckpt-optim-fully-reshardable"],
        ),
        (
            "--af-pipe --af-attention-groups 0",
            2,
            {"sequence_parallel": True, "num_experts": 0},
            [r"--af-attention-groups must", r"--sequence-parallel is not supported", r"--num-experts is not set"],
        ),
    ],
)
def test_bad_input(words: str, world_size: int, megatron: dict[str, Any], messages: list[str]) -> None:
    found = errors(words, world_size=world_size, **megatron)
    assert len(found) == len(messages), found
    for error, message in zip(found, messages, strict=True):
        assert re.search(message, error), error


def schedule_file(path: Path, *, num_layers: int, groups: tuple[int, int], num_micro_batches: int) -> str:
    placement = Placement.round_robin(
        num_layers=num_layers, num_attention_groups=groups[0], num_ffn_groups=groups[1]
    )
    schedule = builders.build(
        "sequential", placement, num_micro_batches=num_micro_batches, costs=builders.NOMINAL_COSTS
    )
    text.save(schedule, path)
    return str(path)


def test_schedule_file_says_the_groups(tmp_path: Path) -> None:
    path = schedule_file(tmp_path / "s.txt", num_layers=4, groups=(1, 2), num_micro_batches=16)
    args = parsed(f"--af-pipe --af-schedule {path}")
    assert arguments.check(args, 3) == []
    assert (args.af_attention_groups, args.af_ffn_groups) == (1, 2)
    assert arguments.placement(args).ffn == (0, 1, 0, 1)


@pytest.mark.parametrize(
    "words, megatron, message",
    [
        ("--af-attention-groups 2", {}, "has 1 such groups, but --af-attention-groups 2: drop it"),
        ("--af-micro-batch-group-size 4", {}, "is a finished schedule, --af-micro-batch-group-size 4 cannot change it"),
        ("--af-max-live-micro-batches 4", {}, "is a finished schedule, --af-max-live-micro-batches 4 cannot change it"),
        ("--af-place-layers balanced", {}, "has placed the layers, --af-place-layers balanced: drop one"),
        ("--af-tail-weight 2", {}, "has placed the layers, --af-tail-weight 2.0: drop one"),
        ("", {"num_layers": 5}, "is for 4 MoE layers, but the model has 5"),
        ("", {"global_batch_size": 64}, "is for 16 micro-batches, but a step of this run has 32"),
        ("", {"step_batch_size_schedule": "0:8 100:16"}, "is for one number of micro-batches"),
    ],
)
def test_schedule_file_that_does_not_fit(tmp_path: Path, words: str, megatron: dict[str, Any], message: str) -> None:
    path = schedule_file(tmp_path / "s.txt", num_layers=4, groups=(1, 2), num_micro_batches=16)
    (error,) = errors(f"--af-pipe --af-schedule {path} {words}", world_size=3, **megatron)
    assert message in error


def test_layers_are_placed_as_asked() -> None:
    args = parsed("--af-pipe --af-attention-groups 2 --af-place-layers balanced --af-tail-weight 2")
    assert arguments.check(args, 4) == []
    assert arguments.topology(args, 4).placement.attention == (0, 1, 1, 1, 0)
    assert args.af_place_layers == "0,1,1,1,0/0,1,0,1"
    assert arguments.check(args, 4) == []  # once more, spelled out
    listed = parsed("--af-pipe --af-attention-groups 2 --af-place-layers (0,1)*2,1/(1,0)*2")
    assert arguments.check(listed, 4) == []
    assert arguments.placement(listed) == Placement(2, 2, (0, 1, 0, 1, 1), (1, 0, 1, 0))


def test_the_tail_is_weighed_by_flops() -> None:
    """Attention of 2 h (3 h + h) + 2 (s + 1) h and router 2 h E, against an output layer of 2 h V."""
    model = {"position_embedding_type": "rope", "vocab_size": 1000, "padded_vocab_size": 1024, "ffn_hidden_size": 64}
    args = parsed("--af-pipe --af-attention-groups 2 --af-place-layers balanced", **model)
    assert arguments.check(args, 4) == []
    assert args.af_tail_weight == pytest.approx(2 * 64 * 1024 / (8 * 64**2 + 2 * 33 * 64 + 2 * 64 * 8))
    assert arguments.placement(args).attention == (0, 1, 1, 1, 0)


def test_a_tail_that_cannot_be_weighed() -> None:
    words = "--af-pipe --af-attention-groups 2 --af-place-layers balanced"
    (error,) = errors(words, world_size=4, position_embedding_type="rope")
    assert re.search(r"balanced weighs the output layer .*--vocab-size: missing: add it, or .* --af-tail-weight", error)


def test_schedule_file_that_is_not_safe(tmp_path: Path) -> None:
    path = Path(schedule_file(tmp_path / "s.txt", num_layers=4, groups=(1, 1), num_micro_batches=16))
    path.write_text(path.read_text().replace("F0: F0.0 ", "F0: "))
    (error,) = errors(f"--af-pipe --af-schedule {path}")
    assert "s.txt" in error
    assert "missing-work" in error


def test_what_is_left_open_gets_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    args = parsed("--af-pipe --af-attention-groups 2")
    assert arguments.check(args, 4) == []
    assert {name: value for name, value in vars(args).items() if name.startswith("af_")} == {
        "af_pipe": True,
        "af_attention_groups": 2,
        "af_ffn_groups": 2,
        "af_attention_ranks": 1,
        "af_ffn_ranks": 1,
        "af_schedule": "interleaved-1f1b",
        "af_place_layers": "in-turn",
        "af_tail_weight": None,
        "af_micro_batch_group_size": None,
        "af_max_live_micro_batches": None,
        "af_recompute": "none",
        "af_redispatch": False,
        "af_transport": "torch",
        "af_dispatch": "per-rank",
        "af_ranks_per_node": 8,
        "af_wire_dtype": "same",
        "af_plan": None,
        "af_init": "replay",
        "af_trace_dir": None,
        "af_timeout_seconds": 600.0,
    }


def test_nixl_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (error,) = errors("--af-pipe --af-transport nixl")
    assert "pip install nixl" in error
