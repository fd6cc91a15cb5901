"""However a job ends, nothing of it is left: not even what has moved into a session of its own."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_disagmoe.quickstart.child import running

#: Starts a process that leaves its group, as torchrun's workers do, says its pid, and waits.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("parent_is_killed", [False, True])
def test_leaving_the_block_ends_the_whole_tree(tmp_path: Path, parent_is_killed: bool) -> None:
    begun = time.monotonic()
    with running([sys.executable, "-c", PARENT], log=tmp_path / "log", environment={}) as (child, lines):
        pid = int(next(lines))
        child._look()
        assert not gone(pid)
        if parent_is_killed:
            parent = psutil.Process(pid).parent()
            assert parent is not None
            parent.kill()
    assert gone(pid)
    assert time.monotonic() - begun < 30
    assert (tmp_path / "log").read_text() == f"{pid}\n"


def test_an_error_within_the_block_ends_it_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT]
    with contextlib.suppress(KeyError), running(command, log=tmp_path / "log", environment={}) as (_, lines):
        pid = int(next(lines))
        raise KeyError
    assert gone(pid)


def test_a_job_that_ends_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os; print(os.environ['WORD']); raise SystemExit(3)"]
    with running(command, log=tmp_path / "log", environment={"WORD": "given"}) as (child, lines):
        assert list(lines) == ["given\n"]
        assert child.wait() == 3
