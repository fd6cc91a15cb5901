"""Run one job as a child and leave nothing of it behind.

torchrun puts its workers into sessions of their own, so a signal to the child's process group would miss them, and a
torchrun that was killed can no longer clean up: the tree of processes is therefore remembered while it lives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import psutil

#: How long processes may take to end after SIGTERM before they are killed.
GRACE_SECONDS = 10.0
#: How often, at most, the tree of processes is looked up while output is read.
_LOOK_EVERY_SECONDS = 2.0


class Stopped(Exception):
    """A signal asked us to stop; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Within: Ctrl-C, a closed terminal and SIGTERM raise ``Stopped``, so that children are stopped on the way out."""

    def stop(number: int, _frame: object) -> None:
        for watched in before:  # a second Ctrl-C must not interrupt the stopping
            signal.signal(watched, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Child:
    """A running command, its output line by line, and every process it has started so far."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C reaches us alone, and we decide how the tree ends
        )
        self._tree: dict[int, psutil.Process] = {}
        self._looked_at = float("-inf")

    def lines(self) -> Iterator[str]:
        """Output, standard error included, until every process that holds it has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if time.monotonic() - self._looked_at > _LOOK_EVERY_SECONDS:
                self._look()
            yield line

    def wait(self) -> int:
        """Exit code of the command; negative: the signal that ended it."""
        return self._process.wait()

    def stop(self) -> None:
        """Terminate the command, kill what is left of its tree after ``GRACE_SECONDS``, reap it."""
        self._look()
        if self._process.poll() is None:
            self._process.terminate()  # torchrun then stops its workers itself
        _, left = psutil.wait_procs(list(self._tree.values()), timeout=GRACE_SECONDS)
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(left, timeout=GRACE_SECONDS)
        self._process.wait()

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            self._tree |= {member.pid: member for member in [parent, *parent.children(recursive=True)]}


@contextlib.contextmanager
def running(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str]
) -> Iterator[tuple[Child, Iterator[str]]]:
    """Start ``command``; yields the child and its output lines, which are also written to ``log``.

    However the block is left, every process of the child's tree has ended afterwards.
    """
    child = Child(command, environment=environment)
    try:
        with log.open("w", buffering=1) as file:
            yield child, _copied(child.lines(), file)
    finally:
        child.stop()


def _copied(lines: Iterator[str], file: TextIO) -> Iterator[str]:
    for line in lines:
        file.write(line)
        yield line
