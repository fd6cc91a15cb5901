"""Bad input ends a real job of several processes before training, with one message for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_disagmoe import errors
from megatron_disagmoe.local_job import Job, run
from tests.cpu.runs import FLAGS

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="starts its ranks by forking")


@pytest.mark.timeout(150)
def test_under_torchrun_it_is_said_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command += ["-m", "megatron_disagmoe.pretrain_gpt", *FLAGS, "--af-pipe"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1  # torchrun's own
    assert ended.stderr.count("disagmoe: 3 processes do not fit the AF-pipe sizes") == 1
    assert "exitcode  : 2" in ended.stderr  # the workers'
    # The only stack is that of torchrun, which prints one for whatever makes a worker end.
    assert ended.stderr.count("Traceback") == ended.stderr.count("ChildFailedError") / 2 <= 1
    assert "iteration" not in ended.stdout


@pytest.mark.timeout(200)
def test_every_way_to_be_wrong_ends_every_rank(tmp_path: Path) -> None:
    cases = {
        "unparsable": (["--af-pipe", "--af-ffn-ranks", "many"], "argument --af-ffn-ranks: invalid int value: 'many'"),
        "alone": (["--af-dispatch", "per-rank"], "--af-dispatch without --af-pipe: add --af-pipe, or drop them"),
        "refused": (["--af-pipe", "--sequence-parallel"], "--sequence-parallel is not supported together with"),
        "megatrons": (["--af-pipe", "--min-lr", "1"], "Megatron refuses these flags: assert args.min_lr <= args.lr"),
        "cpu": (["--af-pipe", "--distributed-backend", "nccl"], "--distributed-backend nccl needs a GPU"),
    }
    jobs = [Job(name=name, world_size=2, flags=[*FLAGS, *flags]) for name, (flags, _) in cases.items()]
    for result in run(jobs, tmp_path):
        message = cases[result.name][1]
        assert result.exit_codes[0] == 2, result.output
        assert result.exit_codes[1] in (2, -15)  # ended as torchrun would, while it waited
        assert result.seconds < errors.GRACE_SECONDS
        assert result.output.count(message) == 1, result.output
        assert "Traceback" not in result.output
        assert not result.left_over
