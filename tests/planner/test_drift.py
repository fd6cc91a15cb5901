"""Whether re-allocating pays: mixes of lengths, newly measured machines, what a reshard costs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_disagmoe.cli import app
from megatron_disagmoe.planner.allocation import Job
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.cluster_spec import Calibration
from megatron_disagmoe.planner.drift import Share, drift, new_plan, parse_mix
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.plan_file import PlanFile, load_plan, save_plan
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.planning import Request, plan
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.verify import verify_plan

MODEL, CLUSTER = load_model("deepseek-moe-16b"), load_cluster("h800-16x8")
#: Few choices: each comparison is many searches.
SPACE = Space(tensor_parallel=(1,), expert_tensor_parallel=(1,), asymmetric=False, schedules=("interleaved-1f1b",))


@pytest.fixture(scope="module")
def short() -> PlanFile:
    """A plan for 4K tokens."""
    return plan_of(plan(Request(MODEL, CLUSTER, Job(4096, 1024), SPACE, keep=1)).ranked[0])


def test_a_mix_is_normalised() -> None:
    assert parse_mix("4096:3,32768:1") == (Share(4096, 0.75), Share(32768, 0.25))
    assert parse_mix("4096") == (Share(4096, 1.0),)


@pytest.mark.parametrize("text", ["", "4096:x", "a:1", "0:1", "4096:-1", "4096:nan", "4096:0", "4096:inf"])
def test_a_bad_mix_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="--mix"):
        parse_mix(text)


def test_nothing_pays_where_nothing_changed(short: PlanFile) -> None:
    found = drift(short, MODEL, CLUSTER, parse_mix("4096"), space=SPACE)
    assert found.best.mean == found.current.mean
    assert math.isinf(found.break_even_steps)
    assert not found.pays(10**9)


def test_longer_sequences_want_another_plan_and_it_pays_in_the_long_run(short: PlanFile) -> None:
    told: list[tuple[str, float]] = []
    found = drift(
        short,
        MODEL,
        CLUSTER,
        parse_mix("65536"),
        space=SPACE,
        progress=lambda what, share, _: told.append((what, share)),
    )
    assert {what for what, _ in told} == {"searching at 65536 tokens", "comparing over the mix"}
    assert told[-1] == ("comparing over the mix", 1.0)
    assert found.best.mean < found.current.mean
    if math.isinf(found.current.mean):
        assert found.break_even_steps == 0
    else:
        steps = found.break_even_steps
        assert steps == pytest.approx(found.reshard_seconds / (found.current.mean - found.best.mean))
        assert found.pays(math.ceil(steps) + 1)
        assert not found.pays(math.floor(steps))
    planned = new_plan(found, short, MODEL, CLUSTER)
    assert planned.batch.sequence_length == 65536
    assert verify_plan(planned, MODEL, CLUSTER) == []


def test_a_reshard_costs_what_a_checkpoint_weighs(short: PlanFile) -> None:
    found = drift(short, MODEL, CLUSTER, parse_mix("4096"), space=SPACE, restart_seconds=100)
    # weights in bf16, master weights and two moments in fp32; 40 GB/s out, 40 GB/s in
    assert found.checkpoint_gb == pytest.approx(MODEL.num_parameters * 14 / 1e9)
    assert found.reshard_seconds == pytest.approx(2 * found.checkpoint_gb / 40 + 100)


def test_new_measurements_are_drift_too(short: PlanFile) -> None:
    """Experts turn out three times slower than planned: they want more of the GPUs."""
    pool = CLUSTER.pools[0]
    gpu = pool.gpu.model_copy(update={"calibration": Calibration(ffn=3.0)})
    measured = CLUSTER.model_copy(update={"pools": (pool.model_copy(update={"gpu": gpu}),)})
    found = drift(short, MODEL, measured, parse_mix("4096"), space=SPACE)
    assert found.saved_per_step > 0
    assert found.best.allocation.ffn_gpus > found.current.allocation.ffn_gpus


def test_the_command(short: PlanFile, tmp_path: Path) -> None:
    path, out = tmp_path / "plan.yaml", tmp_path / "new.yaml"
    save_plan(short, path)
    flags = ["plan", "drift", str(path), "--mix", "8192:0.1,32768:0.9", "--executable", "--out", str(out)]
    result = CliRunner().invoke(app, [*flags, "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found["current"]["by_length"]) == {"8192", "32768"}
    assert found["new"]["step_time_s"] <= found["current"]["step_time_s"]
    assert load_plan(out).runs_here  # the best of all would cut sequences
    assert CliRunner().invoke(app, ["plan", "drift", str(path), "--mix", "x"]).exit_code == 2
