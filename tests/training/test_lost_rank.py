"""A rank that is killed takes the job down, and those that waited for it say so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_disagmoe.local_job import Job, run
from tests.cpu.runs import FLAGS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "pretrain_dying.py"
#: Two attention groups and two FFN groups of one rank each: ranks 0 and 1 are F0 and F1, 2 and 3 are A1 and A0.
RING = [*FLAGS, "--af-pipe", "--af-attention-groups", "2"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="starts more ranks than there are devices")


def assert_that_someone_waited_for(victim: int, output: str) -> None:
    """A line that names a waiting rank with its role, edge, layer, micro-batch, and the victim as its peer."""
    who = r"disagmoe: rank (\d) \([AF]\d r0 [mn]0\): "
    what = r"(M2N|N2M|LANE)( gradient)? of layer \d, micro-batch \d (from|to) rank "
    lines = list(re.finditer(rf"{who}.*?{what}{victim}\b", output))
    assert lines, output[-6000:]
    assert str(victim) not in {line[1] for line in lines}
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0].partition("dying now")[2]


@pytest.mark.timeout(180)
def test_an_attention_rank(tmp_path: Path) -> None:
    (result,) = run([Job("job", 4, RING, script=str(SCRIPT), environment={"DIES": "3"})], tmp_path)
    assert result.exit_codes[3] == -9
    assert all(result.exit_codes)
    assert not result.timed_out
    assert not result.left_over
    assert_that_someone_waited_for(3, result.output)


@pytest.mark.timeout(180)
def test_an_ffn_rank_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["-m", "megatron_disagmoe.launch", str(SCRIPT), *RING]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DIES": "0"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output, died, ranks = "", 0.0, set[psutil.Process]()
    for line in process.stdout:
        output += line
        if line.startswith("dying now"):
            died = time.monotonic()
            ranks = set(psutil.Process(process.pid).children(recursive=True))
    assert process.wait() != 0
    assert died, output[-6000:]
    assert time.monotonic() - died < 60
    assert len(ranks) >= 3
    assert not [rank for rank in ranks if rank.is_running()]
    assert_that_someone_waited_for(0, output)
