"""Plans from end to end: every model at two lengths, plan files, what verification finds, messages."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megatron_disagmoe.cli import app
from megatron_disagmoe.cli.plan_options import executable_space, space_of
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import Job, NodeLayout
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.explain import explained, uses
from megatron_disagmoe.planner.model_export import megatron_model_flags
from megatron_disagmoe.planner.model_import import load_model, model_from_megatron
from megatron_disagmoe.planner.picture import draw_roofline, points
from megatron_disagmoe.planner.plan_file import PlanFile, flags_of, load_plan, numbers_of, ranges_of, save_plan
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.planning import WORTH, Outcome, Request, default_batch, plan
from megatron_disagmoe.planner.sensitivity import diagnose, sensitivity
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.verify import verify_plan
from megatron_disagmoe.schedules.text import dumps, loads
from tests.planner.test_clusters import _changed

SIX = ("deepseek-moe-16b", "gpt-oss-120b", "qwen3-235b-a22b", "deepseek-v3", "mixtral-8x7b", "quickstart")


def _request(model: str, cluster: str = "h800-16x8", *, sequence: int = 4096, **space: Any) -> Request:
    machines = load_cluster(cluster)
    batch = default_batch(machines, sequence_length=sequence)
    return Request(load_model(model), machines, Job(sequence, batch), Space(**space), keep=1)


@functools.cache
def outcome_of(model: str, sequence: int) -> Outcome:
    """Of a whole search on ``h800-16x8``, which takes seconds to a minute."""
    return plan(_request(model, sequence=sequence))


@pytest.fixture(scope="module")
def mixtral() -> Outcome:
    return outcome_of("mixtral-8x7b", 4096)


@pytest.fixture(scope="module")
def mixtral_plan(mixtral: Outcome) -> PlanFile:
    return plan_of(mixtral.ranked[0], reasons=["because"])


@pytest.mark.parametrize("sequence", [4096, 32768])
@pytest.mark.parametrize("model", SIX)
def test_every_model_has_a_plan_that_verifies(model: str, sequence: int) -> None:
    request = _request(model, sequence=sequence)
    outcome = outcome_of(model, sequence)
    best = outcome.ranked[0]
    planned = plan_of(best)
    assert verify_plan(planned, request.model, request.cluster) == []
    assert best.step_seconds >= best.evaluation.fill_bound + best.evaluation.synchronise_seconds
    for memory in (planned.memory_gb.attention, planned.memory_gb.ffn):
        assert memory.total <= memory.capacity == 80
    # Of the levels searched, the most exact that costs at most a quarter.
    times = {level.state.total: level.seconds for level in outcome.levels}
    level = max(total for total, seconds in times.items() if seconds <= WORTH * min(times.values()))
    assert planned.levers.bytes_per_parameter == level
    if model == "deepseek-v3":
        assert level == 8  # 671e9 parameters: 18, 16 or 14 bytes exceed the cluster, 12 leave no room to train in


def test_a_plan_file_reads_back_equal(mixtral_plan: PlanFile, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    save_plan(mixtral_plan, path)
    assert load_plan(path) == mixtral_plan


def test_a_plan_sets_our_flags(mixtral_plan: PlanFile) -> None:
    flags = flags_of(mixtral_plan)
    sizes = mixtral_plan.sizes
    assert flags["af_attention_groups"] == sizes.attention_groups
    assert flags["af_ffn_ranks"] == sizes.ffn_ranks
    assert flags["af_schedule"] == mixtral_plan.schedule.kind
    assert flags["af_dispatch"] == mixtral_plan.levers.dispatch
    assert "--use-distributed-optimizer" in mixtral_plan.megatron_flags


def test_a_plan_says_where_every_rank_sits(mixtral_plan: PlanFile) -> None:
    ranks = [rank for host in mixtral_plan.hosts for rank in numbers_of(host.ranks)]
    assert sorted(ranks) == list(range(mixtral_plan.sizes.gpus))
    assert len(mixtral_plan.hosts) == mixtral_plan.machines.nodes <= 16
    assert all(len(numbers_of(host.ranks)) <= 8 for host in mixtral_plan.hosts)


def test_costs_in_a_plan_are_those_it_was_ranked_with(mixtral: Outcome, mixtral_plan: PlanFile) -> None:
    costs = mixtral_plan.costs.stage_costs()
    assert costs == mixtral.ranked[0].evaluation.costs
    again = dict(mixtral_plan.costs.model_dump())
    again["attention"] = [*again["attention"], again["attention"][0]]
    with pytest.raises(ValueError, match="there twice"):
        type(mixtral_plan.costs).model_validate(again).stage_costs()


def test_the_schedule_of_a_plan_can_be_kept_beside_traces(mixtral: Outcome) -> None:
    """Its parameters hold the times of every stage, which a schedule file must be able to say."""
    schedule = mixtral.ranked[0].schedule
    assert loads(dumps(schedule)).parameters == schedule.parameters


def test_ranges() -> None:
    assert ranges_of([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert numbers_of("0-2,5,7-8") == [0, 1, 2, 5, 7, 8]
    with pytest.raises(ValueError, match="no such stage"):
        numbers_of("0-9999999999")


TAMPERED: list[tuple[str, Any, str]] = [
    ("sizes.gpus", 7, "sizes.gpus"),
    ("sizes.ffn_ranks", 3, "ffn_ranks 3"),
    ("sizes.attention_ranks", 4096, "attention_ranks 4096"),
    ("batch.micro_batches", 3, "batch.micro_batches"),
    ("batch.global_batch_size", 1021, "attention_ranks"),
    ("machines.attention_pool", "b200", "machines.attention_pool"),
    ("levers.bytes_per_parameter", 10, "--bytes-per-parameter 10"),
    ("expected.step_time_s", 0.5, "expected.step_time_s"),
    ("expected.fill_bound_s", 0.5, "expected.fill_bound_s"),
    ("memory_gb.ffn.total", 1.0, "memory_gb.ffn.total"),
    ("schedule.peak_live_ffn", 1, "schedule.peak_live_ffn"),
    ("flags", {"--af-attention-groups": 1}, "flags.--af-dispatch"),
    ("megatron_flags", ["--seq-length", "1"], "megatron_flags"),
    ("model", "other", "model"),
    ("cluster", "other", "cluster"),
]


@pytest.mark.parametrize(("path", "value", "field"), TAMPERED)
def test_verification_names_what_was_tampered_with(mixtral_plan: PlanFile, path: str, value: Any, field: str) -> None:
    tampered = PlanFile.model_validate(_changed(mixtral_plan.model_dump(mode="json"), path, value))
    errors = verify_plan(tampered, load_model("mixtral-8x7b"), load_cluster("h800-16x8"))
    assert any(field in error for error in errors), errors


def test_a_plan_for_ample_memory_does_not_fit_less(mixtral_plan: PlanFile) -> None:
    cluster = load_cluster("h800-16x8")
    gpu = cluster.pools[0].gpu.model_copy(update={"memory_gb": 40.0})
    small = cluster.model_copy(update={"pools": (cluster.pools[0].model_copy(update={"gpu": gpu}),)})
    errors = verify_plan(mixtral_plan, load_model("mixtral-8x7b"), small)
    assert any("memory_gb" in error and "40" in error for error in errors)


def test_uses_and_roofline_of_a_plan(mixtral: Outcome, tmp_path: Path) -> None:
    best = mixtral.ranked[0]
    most = uses(best)
    assert len(most) == 6
    assert most[0].seconds == max(use.seconds for use in most) <= best.pipeline_seconds
    for point in points(best):
        assert 0 < point.achieved <= point.computing < point.at_peak
    for name in ("roofline.png", "roofline.svg"):
        draw_roofline(best, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(ValueError, match=r"\.gif"):
        draw_roofline(best, tmp_path / "roofline.gif")


def test_reasons_name_every_lever_that_is_on() -> None:
    # One node: experts of 12.6e9 parameters on 4 GPUs leave little room.
    cluster = load_cluster("h800-16x8")
    node = cluster.model_copy(update={"pools": (cluster.pools[0].model_copy(update={"num_nodes": 2}),)})
    request = Request(load_model("deepseek-moe-16b"), node, Job(16384, 16), Space(asymmetric=False), keep=1)
    outcome, said = explained(plan(request))
    a = outcome.ranked[0].evaluation.allocation
    levers = [a.tensor_parallel * a.context_parallel > 1, a.recompute_ffn is not Recompute.NONE, a.redispatch]
    assert any(levers), "pick a tighter problem"
    for on, words in zip(levers, ("TP", "recomputation on the FFN side", "dispatching again"), strict=True):
        assert on == any(words in line for line in said)
    assert all("without it" in line for line in said)


def test_sensitivity_moves_the_right_way() -> None:
    request = _request("deepseek-moe-16b", tensor_parallel=(1,), context_parallel=(1,), asymmetric=False)
    base = plan(request).levels[0].seconds
    rows = {row.change: row.seconds for row in sensitivity(request)}
    assert all(seconds is not None for seconds in rows.values())
    known = {change: seconds for change, seconds in rows.items() if seconds is not None}
    assert known["NICs x 0.5"] >= base >= known["NICs x 2"]
    assert known["NVLink x 0.5"] >= base >= known["NVLink x 2"]
    assert known["GPU memory x 0.9"] >= base >= known["GPU memory x 1.25"]
    assert known["one node less"] >= base
    assert known["busiest FFN rank 1.3 x the mean"] > base
    assert 1.6 * base < known["twice the batch"] < 2.4 * base


def test_an_impossible_plan_says_why_and_what_would_help() -> None:
    request = _request("deepseek-v3", bytes_per_parameter=(18,))
    assert plan(request).ranked == ()
    found = diagnose(request)
    assert "671 billion parameters at 18 bytes need 12,0" in found.why[0]
    remedies = {remedy.change: remedy.seconds for remedy in found.remedies}
    assert any("bytes per parameter" in change for change in remedies)
    more = next(change for change in remedies if "GPUs with" in change)
    needed = int(more.split()[2])
    assert 12_078 / 128 < needed < 130  # at least the states alone
    assert any("nodes instead of 16" in change for change in remedies)


def test_default_batches() -> None:
    h800 = load_cluster("h800-16x8")
    assert default_batch(h800, sequence_length=4096) == 1024
    assert default_batch(h800, sequence_length=32768) == 128
    assert default_batch(load_cluster("h800-2048x8"), sequence_length=4096) == 16384
    assert default_batch(load_cluster("laptop"), sequence_length=4096, micro_batch_size=3) == 96


def test_mixed_gpus_may_hold_the_two_sides() -> None:
    """Compute-rich GPUs for attention, memory-rich ones for experts."""
    cluster = load_cluster("h800-16x8")
    h20 = load_cluster("h800-16x8").model_dump(mode="json")
    pools = [h20["pools"][0] | {"num_nodes": 4}, h20["pools"][0] | {"name": "h20", "num_nodes": 4, "gpu": "h20"}]
    mixed = type(cluster).model_validate(h20 | {"name": "mixed", "pools": pools})
    request = Request(load_model("mixtral-8x7b"), mixed, Job(32768, 64), Space(layouts=tuple(NodeLayout)), keep=1)
    outcome = plan(request)
    planned = plan_of(outcome.ranked[0])
    assert (planned.machines.attention_pool, planned.machines.ffn_pool) in (("h800", "h800"), ("h800", "h20"))
    assert verify_plan(planned, request.model, mixed) == []
    found = [each for level in outcome.levels for each in level.found]
    by_pools = {(f.problem.attention_pool_index, f.problem.ffn_pool_index): f for f in found}
    assert set(by_pools) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    across = by_pools[0, 1]
    assert len(across.seconds)
    assert set(across.candidates.layout.tolist()) == {0}  # sides of different GPUs share no node


@pytest.mark.parametrize("model", SIX)
def test_models_as_megatron_flags_read_back(model: str) -> None:
    spec = load_model(model)
    flags = megatron_model_flags(spec, sequence_length=4096)
    again = model_from_megatron([*flags, "--padded-vocab-size", str(spec.vocab_size)], name=spec.name)
    # What Megatron has no flag for, or keeps elsewhere.
    ignored = {"sources", "published"}
    ours, theirs = spec.model_dump(exclude=ignored), again.model_dump(exclude=ignored)
    for each in (ours, theirs):
        each["moe"].pop("router_bias")
        each["attention"].pop("sinks", None)
    if model == "gpt-oss-120b":  # its experts and attention have biases, so all linear layers have in Megatron
        assert theirs.pop("linear_bias")
        ours.pop("linear_bias")
    assert theirs == ours


def test_what_this_version_runs() -> None:
    space = executable_space(Space())
    assert space.tensor_parallel == space.context_parallel == space.expert_tensor_parallel == (1,)
    assert Recompute.SELECTIVE not in space.recompute_attention
    with pytest.raises(ValueError, match="tensor_parallel"):
        executable_space(Space(tensor_parallel=(2, 4)))


def test_choices_from_flags() -> None:
    space = space_of(fixed=["ffn_ranks=16,32", "recompute_ffn=full,redispatch"], bytes_per_parameter="18,12")
    assert space.ffn_ranks == (16, 32)
    assert space.ffn_levers == ((Recompute.FULL, False), (Recompute.FULL, True))
    assert space.bytes_per_parameter == (18, 12)


RUNNER = CliRunner()
SMALL = ("--model", "quickstart", "--cluster", "laptop", "--seq-length", "128", "--global-batch-size", "16")


def _plan_command(*flags: str) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, ["plan", *flags])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_writes_a_plan_that_it_verifies(tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    code, stdout, _ = _plan_command(*SMALL, "--executable", "--out", str(out), "--json")
    assert code == 0
    result = json.loads(stdout)
    sizes = {"attention_groups", "ffn_groups", "attention_ranks", "ffn_ranks", "replicas"}
    assert sizes | {"attention_nics", "ffn_nics", "step_time_s", "memory_gb", "solve_time_s"} <= set(result)
    assert set(result["memory_gb"]) == {"attention", "ffn"}
    assert result["paper"] is None  # the laptop has no NICs to split
    assert math.isfinite(result["step_time_s"])
    assert result["alternatives"][0]["analytic_s"] == pytest.approx(result["step_time_s"], rel=0.02)
    code, stdout, _ = _plan_command("verify", str(out), "--model", "quickstart", "--cluster", "laptop", "--json")
    assert (code, json.loads(stdout)) == (0, {"ok": True, "errors": [], "runs_here": True, "missing": []})
    content = yaml.safe_load(out.read_text())
    content["expected"]["step_time_s"] *= 2
    out.write_text(yaml.safe_dump(content))
    code, stdout, _ = _plan_command("verify", str(out), "--json")
    assert code == 1
    assert "expected.step_time_s" in json.loads(stdout)["errors"][0]


def test_the_command_explains_itself_to_people() -> None:
    code, stdout, _ = _plan_command(*SMALL)
    assert code == 0
    for words in ("what binds", "memory", "next best", "sensitivity", "candidates scored"):
        assert words in stdout


def test_long_searches_tell_how_far_they_are() -> None:
    """Search, ranking to its very end, plans without a lever and the sensitivity; shares only grow within each."""
    told: list[tuple[str, float, int]] = []

    def tell(what: str, share: float, count: int) -> None:
        told.append((what, share, count))

    few = Space(attention_ranks=(1,), ffn_ranks=(1,), replicas=(1,), dispatch=("per-rank",))
    again = replace(few, ffn_levers=((Recompute.FULL, True),))
    request = Request(load_model("quickstart"), load_cluster("laptop"), Job(128, 16), again, keep=2)
    outcome = plan(request, progress=tell)
    assert outcome.ranked
    number_of_plan = len(told)
    looser = replace(outcome, request=replace(request, space=few))
    explained(looser, progress=tell)
    number_explained = len(told)
    rows = sensitivity(request, progress=tell)
    by_part: dict[str, list[float]] = {}
    for what, share, _ in told[:number_of_plan]:
        by_part.setdefault(what, []).append(share)
    assert [what for what in by_part if what.startswith("searching at ")]
    for what, shares in by_part.items():
        assert all(0 < share <= 1 for share in shares), what
    ranking = by_part["ranking by simulation"]
    assert ranking == sorted(ranking)
    assert ranking[-1] == 1.0
    assert len(ranking) > 2 * len(outcome.ranked) > 0, "each shape is looked at twice, and the best once more"
    said = {what for what, _, _ in told[number_of_plan:number_explained]}
    assert said
    assert all(what.startswith("without dispatching again for backward: ") for what in said)
    assert [share for _, share, _ in told[number_explained:]] == [n / len(rows) for n in range(len(rows))]


def test_no_plan_is_exit_code_1() -> None:
    code, stdout, _ = _plan_command("--model", "deepseek-v3", "--cluster", "laptop", "--seq-length", "4096", "--json")
    assert code == 1
    assert json.loads(stdout)["feasible"] is False


def _write(folder: Path, content: Any) -> str:
    path = folder / "bad.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


BAD: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda _: ["--cluster", "laptop", "--seq-length", "8"], "--model is missing"),
    (lambda _: ["--model", "nothing", "--cluster", "laptop", "--seq-length", "8"], "--model"),
    (lambda _: ["--model", "quickstart", "--cluster", "moon", "--seq-length", "8"], "--cluster"),
    (lambda _: ["--model", "quickstart", "--cluster", "laptop", "--seq-length", "2000000000"], "--seq-length"),
    (lambda _: [*SMALL, "--micro-batch-size", "7"], "--global-batch-size 16"),
    (lambda _: [*SMALL, "--imbalance", "nan"], "--imbalance"),
    (lambda _: [*SMALL, "--picture", "roofline.gif"], "--picture roofline.gif"),
    (lambda _: [*SMALL, "--fix", "ffn_ranks=7"], "ffn_ranks"),
    (lambda _: [*SMALL, "--fix", "ranks=7"], "--fix ranks=7"),
    (lambda _: [*SMALL, "--fix", "dispatch=by-hand"], "dispatch=by-hand"),
    (lambda _: [*SMALL, "--bytes-per-parameter", "18"], "--bytes-per-parameter 18"),
    (lambda f: ["--model", _write(f, "a: [1"), "--cluster", "laptop", "--seq-length", "8"], "not valid YAML"),
    (lambda f: ["--model", _write(f, {"name": "x"}), "--cluster", "laptop", "--seq-length", "8"], "num_layers"),
    (lambda f: ["verify", _write(f, {"format": "x"})], "format"),
    (lambda f: ["verify", _write(f, {"format": "disagmoe-plan 1"})], "sizes"),
    (lambda _: ["verify", "/nowhere/plan.yaml"], "/nowhere/plan.yaml"),
]


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_input_is_exit_code_2_and_names_the_field(
    flags: Callable[[Path], list[str]], words: str, tmp_path: Path
) -> None:
    code, stdout, stderr = _plan_command(*flags(tmp_path))
    assert code == 2
    assert stdout == ""
    assert words in stderr


@pytest.mark.parametrize("value", [0, float("nan"), float("inf"), -1])
def test_impossible_bandwidth_is_exit_code_2(value: float, tmp_path: Path) -> None:
    cluster = load_cluster("laptop").model_dump(mode="json")
    bad = _write(tmp_path, _changed(cluster, "pools.0.nvlink_gb_per_s", value))
    code, _, stderr = _plan_command("--model", "quickstart", "--cluster", bad, "--seq-length", "128")
    assert code == 2
    assert "pools.0.nvlink_gb_per_s" in stderr
