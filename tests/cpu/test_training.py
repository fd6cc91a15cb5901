"""Vanilla Megatron trains on a CPU, through the launcher and through the package's own entry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_disagmoe.local_job import Job, run
from tests.cpu.runs import EXPERT_PARALLEL, FLAGS, losses

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "pretrain_plain.py"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


@pytest.mark.timeout(60)
def test_two_ranks_with_experts_apart_train_and_leave_nothing_behind(tmp_path: Path) -> None:
    save = ["--save", str(tmp_path / "checkpoint"), "--save-interval", "5"]
    [result] = run([Job(name="ep2", world_size=2, flags=[*FLAGS, *EXPERT_PARALLEL, *save])], tmp_path / "run")
    result.checked()  # exit codes 0, and no manager of checkpointing left
    values = losses(result.output)
    assert len(values) == 5
    assert values[-1] < values[0] - 0.05
    assert (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "5"


@pytest.mark.timeout(120)
def test_launcher_and_package_entry_log_the_same_lines(tmp_path: Path) -> None:
    jobs = [
        Job(name="package", world_size=1, flags=FLAGS),
        Job(name="launch", world_size=1, flags=FLAGS, script=str(SCRIPT)),
    ]
    package, launch = run(jobs, tmp_path)
    assert "plain script: sibling found, name __main__" in launch.checked().output
    assert losses(package.checked().output) == losses(launch.output)
    assert len(losses(launch.output)) == 5


@pytest.mark.timeout(60)
def test_under_torchrun_the_flags_added_are_said_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_disagmoe.launch", str(SCRIPT), *FLAGS, *EXPERT_PARALLEL, "--train-iters", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    [line] = [line for line in ended.stdout.splitlines() if line.startswith("disagmoe: no CUDA device")]
    assert "--transformer-impl local" in line
    assert len(losses(ended.stdout)) == 2
