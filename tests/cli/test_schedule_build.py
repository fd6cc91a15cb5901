"""``disagmoe schedule build`` and ``draw``: JSON, files, exit codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.cli import app
from megatron_disagmoe.schedules.actions import Kind, Placement
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.text import load, save
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate

RING = ["--attention-groups", "2", "--layers", "4", "--micro-batches", "8"]
TIMES = ["--t-attention", "1", "--t-ffn", "1.5", "--t-transfer", "0.5"]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["schedule", *words])


def build(out: Path, *words: str) -> Result:
    return run("build", *RING, *TIMES, "--out", str(out), *words)


def test_the_file_is_what_the_figures_describe(tmp_path: Path) -> None:
    out = tmp_path / "plan.txt"
    flags = ("--ffn-groups", "1", "--t-tail", "0.3", "--t-embedding", "0.2", "--backward-ratio", "1.5", "--json")
    done = build(out, *flags)
    assert done.exit_code == 0
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    schedule = load(out)
    costs = StageCosts(attention=1, ffn=1.5, transfer=0.5, tail=0.3, embedding=0.2, backward_ratio=1.5)
    assert schedule.placement == Placement.round_robin(num_layers=4, num_attention_groups=2, num_ffn_groups=1)
    assert answer["makespan"] == simulate(schedule, costs).makespan
    assert answer["peak_live"] == {str(group): live for group, live in peak_live(schedule).items()}
    assert answer["costs"] == schedule.parameters["costs"] == dataclasses.asdict(costs)
    # F0 alone: 8 micro-batches of 4 layers, forward and backward
    assert answer["busy_bound"] == pytest.approx(8 * 4 * 1.5 * 2.5)
    assert answer["busy_bound"] < answer["fill_bound"] <= answer["phase_bound"] <= answer["makespan"]
    assert answer["ok"] is True
    assert run("verify", str(out)).exit_code == 0


def test_kinds(tmp_path: Path) -> None:
    kinds: dict[str, set[Kind]] = {}
    for name, flags in {
        "whole": [],
        "split": ["--split-backward"],
        "also split": ["--kind", "split-backward", "--split-backward"],
        "one by one": ["--kind", "sequential"],
        "forward": ["--forward-only"],
    }.items():
        out = tmp_path / "plan.txt"
        assert build(out, *flags).exit_code == 0
        kinds[name] = {action.kind for actions in load(out).actions.values() for action in actions}
    assert kinds == {
        "whole": {Kind.F, Kind.B},
        "split": {Kind.F, Kind.I, Kind.W},
        "also split": {Kind.F, Kind.I, Kind.W},
        "one by one": {Kind.F, Kind.B},
        "forward": {Kind.F},
    }


def test_cap(tmp_path: Path) -> None:
    free = json.loads(build(tmp_path / "free.txt", "--json").stdout)
    capped = json.loads(build(tmp_path / "capped.txt", "--max-live", "6", "--json").stdout)
    assert max(capped["peak_live"].values()) <= 6 < max(free["peak_live"].values())
    assert capped["makespan"] >= free["makespan"]


def test_frontier(tmp_path: Path) -> None:
    out = tmp_path / "plan.txt"
    flags = ("--frontier", "--frontier-caps", "3,12", "--max-live", "12", "--json")
    done = build(out, *flags)
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    assert [(point["lever"], point["max_live"]) for point in answer["frontier"]] == [
        (lever, cap) for lever in ("plain", "recompute-ffn", "recompute", "re-dispatch") for cap in (3, 12)
    ]
    assert answer["makespan"] == answer["frontier"][1]["makespan"]
    assert answer["step_bound"] == answer["frontier"][1]["bound"]
    assert answer["frontier_out"] == str(tmp_path / "plan.frontier.svg")
    assert Path(answer["frontier_out"]).read_bytes().startswith(b"<?xml")
    assert run("verify", str(out)).exit_code == 0
    people = run("build", *RING, *TIMES, "--frontier", "--frontier-caps", "3", "--out", str(tmp_path / "only.png"))
    assert people.exit_code == 0
    assert "Step time against live activations" in people.stdout
    assert (tmp_path / "only.png").read_bytes().startswith(b"\x89PNG")


def test_redispatch(tmp_path: Path) -> None:
    out = tmp_path / "plan.txt"
    answer = json.loads(build(out, "--redispatch", "--json").stdout)
    assert answer["ok"] is True
    assert (answer["peak_live"]["F0"], answer["peak_live"]["F1"]) == (1, 1)
    assert answer["costs"]["recompute_ffn"] == 1
    kinds = {action.kind for actions in load(out).actions.values() for action in actions}
    assert Kind.D in kinds


def test_order_of_messages(tmp_path: Path) -> None:
    steps = []
    for words in ([], ["--order-messages"]):
        answer = json.loads(build(tmp_path / "plan.txt", "--t-transfer", "2.25", *words, "--json").stdout)
        assert answer["ok"] is True
        steps.append(answer["makespan"])
    assert steps[1] < steps[0]
    schedule = load(tmp_path / "plan.txt")
    assert schedule.ports_in_order
    assert schedule.parameters["order_messages"] is True
    costs = StageCosts(attention=1, ffn=1.5, transfer=2.25)
    assert simulate(schedule, costs).makespan == pytest.approx(steps[1])


def test_fewer_layers_where_a_long_tail_is(tmp_path: Path) -> None:
    steps = []
    for way in ("round-robin", "balanced"):
        out = tmp_path / f"{way}.txt"
        done = build(out, "--t-tail", "2", "--place-layers", way, "--json")
        assert done.exit_code == 0
        answer = json.loads(done.stdout)
        assert answer["step_bound"] <= answer["makespan"]
        steps.append(answer["makespan"])
    assert steps[1] < steps[0]
    assert load(tmp_path / "balanced.txt").placement.attention == (0, 1, 1, 1, 0)


def test_for_people(tmp_path: Path) -> None:
    done = build(tmp_path / "plan.txt")
    assert done.exit_code == 0
    for word in ("makespan", "busy bound", "fill bound", "live at most A0", "wrote"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--t-attention", "-1"], "--t-attention is -1.0"),
        (["--t-ffn", "nan"], "--t-ffn is nan"),
        (["--t-transfer", "inf"], "--t-transfer is inf"),
        (["--t-tail", "-0.5"], "--t-tail is -0.5"),
        (["--t-ffn", "0"], "--t-ffn is 0; a stage takes time"),
        (["--weight-fraction", "2"], "--weight-fraction is 2.0"),
        (["--backward-ratio", "-2"], "--backward-ratio is -2.0"),
        (["--t-attention", "much"], "'--t-attention'"),
        (["--micro-batches", "0"], "'--micro-batches'"),
        (["--attention-groups", "5"], "--attention-groups 5 does not fit 4 MoE layers"),
        (["--ffn-groups", "9"], "--ffn-groups 9 does not fit 4 MoE layers"),
        (["--max-live", "2"], "--max-live 2 is too low for any order: one micro-batch alone needs 3"),
        (["--kind", "best"], "--kind best: choose among interleaved-1f1b"),
        (["--kind", "sequential", "--split-backward"], "leave out --split-backward"),
        (["--group-size", "0"], "'--group-size'"),
        (["--order-messages", "--t-transfer", "0"], "--order-messages puts no messages in order where transfers take"),
        (["--place-layers", "well"], "--place-layers 'well' is no list of groups"),
        (["--frontier", "--frontier-caps", "3,x"], "--frontier-caps '3,x' is not a list of whole numbers"),
        (["--frontier", "--frontier-caps", "1,4"], "--frontier-caps: 1 is too low for any order; the least is 3"),
    ],
)
def test_bad_input_exits_2_and_names_the_flag(tmp_path: Path, words: list[str], message: str) -> None:
    out = tmp_path / "plan.txt"
    done = build(out, *words, "--json")
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert not out.exists()


def test_missing_flags_are_named(tmp_path: Path) -> None:
    done = run("build", *RING, "--t-ffn", "1", "--t-transfer", "1", "--out", str(tmp_path / "plan.txt"))
    assert (done.exit_code, "--t-attention is missing" in done.stderr) == (2, True)
    done = run("build", *RING, *TIMES)
    assert (done.exit_code, "--out is missing" in done.stderr) == (2, True)
    done = run("build", *TIMES, "--out", str(tmp_path / "plan.txt"))
    assert (done.exit_code, "'--attention-groups'" in done.stderr) == (2, True)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    out = tmp_path / "plan.txt"
    assert build(out).exit_code == 0
    return out


@pytest.mark.parametrize("suffix, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("html", b"<!doctype html>")])
def test_draw(plan: Path, tmp_path: Path, suffix: str, begins: bytes) -> None:
    out = tmp_path / f"picture.{suffix}"
    done = run("draw", str(plan), "--out", str(out), "--json")
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    assert answer["out"] == str(out)
    assert out.read_bytes()[:40].lower().startswith(begins.lower())
    costs = StageCosts(attention=1, ffn=1.5, transfer=0.5)
    assert answer["makespan"] == simulate(load(plan), costs).makespan


def test_draw_in_the_terminal(plan: Path) -> None:
    done = run("draw", str(plan))
    assert done.exit_code == 0
    for word in ("interleaved-1f1b: 2 attention and 2 FFN groups", "fill bound", "A1", "F0", "backward"):
        assert word in done.stdout


def test_draw_with_other_costs(plan: Path, tmp_path: Path) -> None:
    done = run("draw", str(plan), "--out", str(tmp_path / "p.html"), "--t-transfer", "3", "--json")
    expected = simulate(load(plan), StageCosts(attention=1, ffn=1.5, transfer=3)).makespan
    assert json.loads(done.stdout)["makespan"] == expected


def test_draw_needs_costs_a_known_suffix_and_a_schedule_that_runs(plan: Path, tmp_path: Path) -> None:
    done = run("draw", str(plan), "--out", str(tmp_path / "picture.gif"))
    assert (done.exit_code, "cannot draw picture.gif" in done.stderr) == (2, True)
    assert not (tmp_path / "picture.gif").exists()
    placement = Placement.round_robin(num_layers=1, num_attention_groups=1, num_ffn_groups=1)
    schedule = sequential(placement, num_micro_batches=1)
    bare = tmp_path / "bare.txt"
    save(schedule, bare)
    done = run("draw", str(bare))
    assert (done.exit_code, "--t-attention is missing" in done.stderr) == (2, True)
    (group, *_) = placement.groups
    backwards = {**schedule.actions, group: schedule.actions[group][::-1]}
    save(dataclasses.replace(schedule, actions=backwards), bare)
    done = run("draw", str(bare), *TIMES)
    assert done.exit_code == 2
    assert f"disagmoe schedule verify {bare} shows where" in done.stderr
