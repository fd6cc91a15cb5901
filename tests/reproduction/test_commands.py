"""``disagmoe simulate``, ``disagmoe reproduce`` and the launch scripts, through the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_disagmoe import plan_launch
from megatron_disagmoe.cli import app
from megatron_disagmoe.planner.allocation import Job
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.plan_file import load_plan, save_plan
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.planning import Request, plan
from megatron_disagmoe.planner.space import Space

ROOT = Path(__file__).resolve().parents[2]


def ask(*words: str) -> tuple[int, Any]:
    """Exit code and JSON (None where there is none)."""
    done = CliRunner().invoke(app, [*words, "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else None


def simulate(system: str, *more: str) -> tuple[int, Any]:
    words = ("--model", "deepseek-moe-16b", "--cluster", "h800-16x8", "--seq-length", "4096", "--system", system)
    return ask("simulate", *words, *more)


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two depths a side of two GPUs each, on the real cluster's description."""
    space = Space(
        attention_groups=(2,),
        ffn_groups=(2,),
        attention_ranks=(2,),
        ffn_ranks=(2,),
        replicas=(16,),
        tensor_parallel=(1,),
        context_parallel=(1,),
        expert_tensor_parallel=(1,),
        dispatch=("per-rank",),
        schedules=("interleaved-1f1b",),
        bytes_per_parameter=(18,),
    )
    request = Request(
        load_model("deepseek-moe-16b"), load_cluster("h800-16x8"), Job(4096, 512), space=space, keep=1
    )
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    save_plan(plan_of(plan(request).ranked[0]), path)
    return path


def test_simulate_says_what_a_step_takes(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    code, result = simulate("megatron-1f1b", "--trace", str(trace))
    assert code == 0
    assert result["tokens_per_second"] == pytest.approx(512 * 4096 / result["step_time_s"])
    assert 0 < result["exposed_communication_s"] < result["step_time_s"]
    assert result["bubble_s"] >= 0
    assert result["peak_memory_gb"] <= 80
    events = [each for each in json.loads(trace.read_text())["traceEvents"] if each["ph"] == "X"]
    end = max(each["ts"] + each["dur"] for each in events)
    assert end / 1e6 == pytest.approx(result["step_time_s"], rel=0.2)
    assert end / 1e6 < result["step_time_s"]


def test_overlap_exposes_less_than_blocking() -> None:
    exposed = {s: simulate(s)[1]["exposed_communication_s"] for s in ("megatron-1f1b", "megatron-overlap", "dualpipe")}
    assert exposed["megatron-1f1b"] > max(exposed["megatron-overlap"], exposed["dualpipe"])


def test_simulate_runs_a_plan(small_plan: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    code, result = simulate("af-pipe", "--plan", str(small_plan), "--as-shipped", "--trace", str(trace))
    assert code == 0
    assert result["step_time_s"] == pytest.approx(load_plan(small_plan).expected.step_time_s, rel=1e-6)
    names = {each["args"]["name"] for each in json.loads(trace.read_text())["traceEvents"] if each["ph"] == "M"}
    assert {"A0", "A1", "F0", "F1", "compute", "send"} <= names


@pytest.mark.parametrize(
    "words, message",
    [
        (("--expert-parallel", "3"), "--expert-parallel 3"),
        (("--bytes-per-parameter", "17"), "--bytes-per-parameter 17"),
        (("--plan", "missing.yaml"), "missing.yaml"),
    ],
)
def test_simulate_refuses_bad_input(words: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(
        app,
        ["simulate", "--model", "deepseek-moe-16b", "--cluster", "h800-16x8", "--seq-length", "4096",
         "--system", "megatron-1f1b", *words],
    )  # fmt: skip
    assert done.exit_code == 2
    assert message in done.output


def test_simulate_knows_its_systems() -> None:
    done = CliRunner().invoke(
        app,
        ["simulate", "--model", "deepseek-moe-16b", "--cluster", "h800-16x8", "--seq-length", "4096",
         "--system", "alpa"],
    )  # fmt: skip
    assert done.exit_code == 2
    assert "there is no baseline 'alpa'" in done.output


def test_nothing_fits_is_exit_code_1() -> None:
    words = ("--model", "deepseek-v3", "--cluster", "h800-16x8", "--seq-length", "4096", "--system", "megatron-1f1b")
    assert ask("simulate", *words) == (1, {"feasible": False})


def test_reproduce_writes_rows_and_pictures_and_fails_past_the_tolerance(tmp_path: Path) -> None:
    code, result = ask("reproduce", "fig6", "--out", str(tmp_path))
    assert code == 1  # two shares of attention are fitted to 10 to 13%
    assert all(row["calibration"] for row in result["rows"])
    assert (result["predictions"], result["calibration_rows"]) == (0, 10)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "fig6a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "fig6a.svg").read_text()
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(result["rows"])


def test_reproduce_knows_its_figures() -> None:
    done = CliRunner().invoke(app, ["reproduce", "fig99"])
    assert done.exit_code == 2
    assert "there is no figure 'fig99'" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fig6a", "--set", "free_cuts"), "write NAME=NUMBER"),
        (("fig6a", "--set", "free_cuts=2"), "free_cuts is between 0 and 1"),
        (("fig6a", "--set", "speed=2"), "there is no constant 'speed'"),
        (("bars", "--set", "free_cuts=1"), "--set is for figures and ceiling"),
        (("beyond", "--studies", "weather"), "there is no study 'weather'"),
    ],
)
def test_reproduce_refuses_bad_input(words: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, ["reproduce", *words], env={"COLUMNS": "300"})
    assert done.exit_code == 2
    assert message in done.output


def test_another_constant_is_calibrated_anew() -> None:
    usual, wider = (ask("reproduce", "fig6a", *more)[1]["rows"] for more in ((), ("--set", "expert_parallel=32")))
    assert [row["paper"] for row in usual] == [row["paper"] for row in wider]
    assert [row["ours"] for row in usual] != [row["ours"] for row in wider]


def test_dry_run_gives_every_rank_its_role_and_command(
    small_plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_launch.main([str(small_plan), "--dry-run", "--master", "n0", "--", "--train-iters", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 128
    planned = load_plan(small_plan)
    for host in planned.hosts:
        mine = [line for line in lines if line.startswith(f"node {host.node} ")]
        assert len(mine) == 8
        assert sorted(int(line.split("LOCAL_RANK=")[1].split()[0]) for line in mine) == list(range(8))
    assert all("--train-iters 10" in line and "--af-plan" in line and "MASTER_ADDR=n0" in line for line in lines)
    assert sum(" F0 " in line for line in lines) == 2 * 16
    # node 0's launcher serves the store, wherever rank 0 is
    assert all("TORCHELASTIC_USE_AGENT_STORE=True" in line for line in lines)


def test_a_plan_that_does_not_hold_is_refused(
    small_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(small_plan.read_text().replace("ffn_ranks: 2", "ffn_ranks: 4"))
    assert plan_launch.main([str(broken), "--dry-run"]) == 2
    assert "does not hold" in capsys.readouterr().err
    assert plan_launch.main([str(small_plan), "--node", "99"]) == 2
    assert plan_launch.main([str(small_plan)]) == 2


def test_the_script_verifies_and_prints(small_plan: Path) -> None:
    python = Path(sys.executable)
    words = ("--model", "deepseek-moe-16b", "--plan", str(small_plan), "--dry-run", "--node", "3")
    done = subprocess.run(
        ["bash", "scripts/slurm/run_16x8.sbatch.sh", *words],
        cwd=ROOT,
        env={"PATH": f"{python.parent}:/usr/bin:/bin", "DISAGMOE_VENV": str(python.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the plan holds" in done.stderr
    assert len(done.stdout.splitlines()) == 8
