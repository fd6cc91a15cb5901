"""Fits and local search without processes, and one job of real trials: a plan made small trains by ``--af-plan``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_disagmoe.benchmarks.planner import _choice, emulated_cluster, emulated_model
from megatron_disagmoe.cli import app
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import Allocation, Job, NodeLayout
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.cluster_spec import Calibration, Cluster
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.plan_file import PlanFile, load_plan
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.planning import Request
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.rerank import Ranked, ranked_as_planned
from megatron_disagmoe.planner.scaled import rehearsal
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.states import state_levels
from megatron_disagmoe.planner.verify import verify_plan
from megatron_disagmoe.profiling.command import check_machine
from megatron_disagmoe.profiling.fit import calibrated, without_calibration
from megatron_disagmoe.profiling.local_search import profile
from megatron_disagmoe.profiling.rehearse import rehearse
from megatron_disagmoe.profiling.trials import Trial
from megatron_disagmoe.simulator.costs import StageCosts
from tests.planner.problems import allocation, problem

SIZES = ((1, 1, 2, 2), (2, 2, 4, 2), (1, 2, 4, 4))


def _ranked(cluster: Cluster, sizes: tuple[int, int, int, int]) -> Ranked:
    a = Allocation(
        attention_groups=sizes[0],
        ffn_groups=sizes[1],
        attention_ranks=sizes[2],
        ffn_ranks=sizes[3],
        nodes=NodeLayout.SPREAD,
    )
    space = Space(distributed_optimizer=False)
    planned = Problem(emulated_model(), cluster, Job(128, 32), space, state_levels("fp32")[0])
    return ranked_as_planned(evaluate(planned, a), group_size=None, max_live=None)


def _trial(cluster: Cluster, known: Cluster, sizes: tuple[int, int, int, int]) -> Trial:
    """What a perfect measurement on ``cluster`` of a plan made for ``known`` would be."""
    real = _ranked(cluster, sizes)
    fields = {field.name: getattr(real.evaluation.costs, field.name) for field in dataclasses.fields(StageCosts)}
    return Trial(plan_of(_ranked(known, sizes)), StageCosts(**fields), real.step_seconds, ())


def test_a_fit_finds_the_factors_of_the_machine() -> None:
    known, truth = emulated_cluster(truth=False), emulated_cluster(truth=True)
    fitted = calibrated(known, emulated_model(), [_trial(truth, known, sizes) for sizes in SIZES])
    found, real = fitted.pools[0].gpu.calibration, truth.pools[0].gpu.calibration
    assert found.attention == pytest.approx(real.attention, rel=0.01)
    assert found.ffn == pytest.approx(real.ffn, rel=0.01)
    assert found.backward == pytest.approx(real.backward, rel=0.03)
    assert fitted.network.calibration == pytest.approx(truth.network.calibration, rel=0.01)
    for sizes in ((1, 1, 4, 8), (2, 1, 4, 4)):  # not among the trials
        predicted, actual = _ranked(fitted, sizes).pipeline_seconds, _ranked(truth, sizes).pipeline_seconds
        assert predicted == pytest.approx(actual, rel=0.03)


def test_a_fit_tells_latency_from_bandwidth() -> None:
    """What every message takes, whatever its size, must not make large transfers slower."""
    known, truth = emulated_cluster(truth=False), emulated_cluster(truth=True)
    trials = []
    for trial in (_trial(truth, known, sizes) for sizes in SIZES):
        late = {"transfer": trial.costs.transfer + 1e-3, "combine": trial.costs.edge(1) + 1e-3}
        trials.append(dataclasses.replace(trial, costs=dataclasses.replace(trial.costs, **late)))
    network = calibrated(known, emulated_model(), trials).network
    assert network.calibration == pytest.approx(truth.network.calibration, rel=0.01)
    assert network.local_latency_us == pytest.approx(truth.network.local_latency_us + 1000, rel=0.01)
    alone = calibrated(known, emulated_model(), trials[:1]).network  # transfers of one size make no line
    assert alone.local_latency_us == pytest.approx(known.network.local_latency_us)
    assert alone.calibration > truth.network.calibration


def test_a_fit_replaces_an_earlier_one() -> None:
    known, truth = emulated_cluster(truth=False), emulated_cluster(truth=True)
    trials = [_trial(truth, known, sizes) for sizes in SIZES]
    assert calibrated(truth, emulated_model(), trials) == calibrated(known, emulated_model(), trials).model_copy()
    assert without_calibration(truth).pools[0].gpu.calibration == Calibration()


def test_what_a_step_takes_beside_its_pipeline_is_overhead() -> None:
    known = emulated_cluster(truth=False)
    late = dataclasses.replace(_trial(known, known, SIZES[0]), step_seconds=10.0)
    fitted = calibrated(known, emulated_model(), [late])
    again = _ranked(fitted, SIZES[0])
    assert fitted.step_overhead_s > 0
    assert again.step_seconds == pytest.approx(10.0, rel=0.02)


def _request() -> Request:
    space = Space(
        tensor_parallel=(1,),
        context_parallel=(1,),
        expert_tensor_parallel=(1,),
        recompute_attention=(Recompute.NONE,),
        ffn_levers=((Recompute.NONE, False),),
        dispatch=("per-rank",),
        layouts=(NodeLayout.SPREAD,),
        schedules=("interleaved-1f1b",),
        distributed_optimizer=False,
    )
    return Request(emulated_model(), emulated_cluster(truth=False), Job(128, 32), space, keep=4)


def test_local_search_keeps_the_best_measured_and_learns_on_the_way() -> None:
    truth, known = emulated_cluster(truth=True), emulated_cluster(truth=False)
    seen: list[PlanFile] = []
    fits: list[int] = []

    def measure(planned: PlanFile) -> Trial:
        seen.append(planned)
        s = planned.sizes
        sizes = (s.attention_groups, s.ffn_groups, s.attention_ranks, s.ffn_ranks)
        return dataclasses.replace(_trial(truth, known, sizes), plan=planned)

    def fit(cluster: Cluster, trials: Sequence[Trial]) -> Cluster:
        fits.append(len(trials))
        return calibrated(cluster, emulated_model(), trials)

    found = profile(_request(), measure, fit, trials=3, radius=1)
    assert len(found.tried) == len(seen) == 3
    assert fits == [1, 2, 3]
    assert found.best.seconds == min(each.seconds for each in found.tried)
    assert len({(planned.sizes, planned.schedule.kind, planned.levers) for planned in seen}) == 3
    assert found.cluster.pools[0].gpu.calibration.ffn == pytest.approx(1.3, rel=0.02)


def test_no_radius_stays_at_the_seed() -> None:
    known = emulated_cluster(truth=False)

    def measure(planned: PlanFile) -> Trial:
        return dataclasses.replace(_trial(known, known, SIZES[0]), plan=planned)

    found = profile(_request(), measure, lambda cluster, trials: cluster, trials=4, radius=0)
    assert len({each.plan.sizes for each in found.tried}) == 1


def test_trials_need_this_machine() -> None:
    with pytest.raises(ValueError, match="h800-16x8"):
        check_machine(Request(load_model("quickstart"), load_cluster("h800-16x8"), Job(128, 16)))
    check_machine(Request(load_model("quickstart"), load_cluster("laptop"), Job(128, 16)))


def test_the_command_runs_trials_fits_and_writes(tmp_path: Path) -> None:
    """One real trial of one attention and one FFN process."""
    plan, fitted = tmp_path / "plan.yaml", tmp_path / "cluster.yaml"
    one = [f"--fix={name}=1" for name in ("attention_groups", "ffn_groups", "attention_ranks", "ffn_ranks")]
    flags = ["--model", "quickstart", "--cluster", "laptop", "--seq-length", "64", "--global-batch-size", "8"]
    trial = ["--profile", "--trials", "1", "--out", str(plan), "--cluster-out", str(fitted), "--json"]
    result = CliRunner().invoke(app, ["plan", *flags, *one, *trial])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    (tried,) = told["trials"]
    assert told["step_time_s"] == tried["measured_s"] > 0
    cluster = load_cluster(str(fitted))
    assert cluster.pools[0].gpu.calibration.attention == told["calibration"]["attention"] != 1.0
    assert verify_plan(load_plan(plan), load_model("quickstart"), load_cluster("laptop")) == []


def test_a_failed_trial_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("job trial-0: exit codes [1]")

    monkeypatch.setattr("megatron_disagmoe.profiling.command.run_trials", fail)
    flags = ["--model", "quickstart", "--cluster", "laptop", "--seq-length", "64", "--global-batch-size", "8"]
    one = [f"--fix={name}=1" for name in ("attention_groups", "ffn_groups", "attention_ranks", "ffn_ranks")]
    result = CliRunner().invoke(app, ["plan", *flags, *one, "--profile"])
    assert result.exit_code == 1
    assert "--profile: job trial-0" in result.stderr


def test_a_choice_holds_if_it_is_near_the_best() -> None:
    rows = [{"allocation": name, "predicted_s": p, "measured_s": m} for name, p, m in (
        ("a", 1.0, 1.2), ("b", 1.1, 1.3), ("c", 1.2, 1.0), ("d", 1.3, 1.4),
    )]  # fmt: skip
    assert not _choice(rows)["holds"]  # the best is third, the first 20% slower
    rows[2]["predicted_s"] = 1.05
    assert _choice(rows)["holds"]  # second
    rows[2] |= {"predicted_s": 1.2, "measured_s": 1.16}
    assert _choice(rows)["holds"]  # third again, but the first is within 5% of it


#: Uneven depth, dispatching again, recomputation, per-node rows, split backwards.
LARGE = (
    ("deepseek-moe-16b", {"attention_groups": 1, "ffn_groups": 1, "dispatch": "per-node",
                          "schedule": "split-backward"}),
    ("mixtral-8x7b", {"attention_groups": 1, "schedule": "split-backward"}),
    ("deepseek-v3", {"attention_groups": 4, "recompute_attention": Recompute.FULL, "recompute_ffn": Recompute.FULL,
                     "redispatch": True}),
)  # fmt: skip


@pytest.fixture(scope="module")
def large() -> list[PlanFile]:
    plans = []
    for model, changes in LARGE:
        evaluation = evaluate(problem(model, batch=64), allocation(**changes))
        plans.append(plan_of(ranked_as_planned(evaluation, group_size=None, max_live=None)))
    return plans


def test_a_small_plan_keeps_what_matters(large: list[PlanFile]) -> None:
    for planned, (name, _) in zip(large, LARGE, strict=True):
        small = rehearsal(planned, load_model(name))
        assert small.plan.runs_here
        assert small.plan.schedule.kind == planned.schedule.kind
        assert small.plan.levers.dispatch == planned.levers.dispatch
        assert small.plan.levers.redispatch == planned.levers.redispatch
        assert (small.plan.sizes.attention_groups > small.plan.sizes.ffn_groups) == (
            planned.sizes.attention_groups > planned.sizes.ffn_groups
        )
        assert small.world_size <= 4
        assert bool(small.left_out) == (name == "deepseek-v3")
        laptop = load_cluster("laptop")
        pool = laptop.pools[0].model_copy(update={"gpus_per_node": small.world_size})
        cluster = laptop.model_copy(update={"pools": (pool,)})
        assert verify_plan(small.plan, small.model, cluster) == []


def test_large_plans_train_when_made_small(large: list[PlanFile], tmp_path: Path) -> None:
    pairs = [(planned, load_model(name)) for planned, (name, _) in zip(large, LARGE, strict=True)]
    for found in rehearse(pairs, tmp_path, steps=2):
        assert found.trained, found.error
        assert len(found.losses) == 2
        assert 5.0 < found.losses[0] < 6.1  # about log 257 at the start
