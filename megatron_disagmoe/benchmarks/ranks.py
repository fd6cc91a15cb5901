"""Run one Python module as the ranks of a torch.distributed world, on this machine or on ``hosts``."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_disagmoe.free_port import free_port

_PORT_IN_HOST = 29500
_END_SECONDS = 5.0


class Place(Protocol):
    """Where a rank runs: a ``hosts.Host``, or ``ThisMachine``."""

    @property
    def address(self) -> str:
        """IPv4 address at which the other ranks find it."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables its processes need."""

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process there."""


class ThisMachine:
    """No namespace: all ranks share this machine's network."""

    address = "127.0.0.1"
    environment: Mapping[str, str] = {}

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process."""
        return subprocess.Popen(argv, **options)


def run_ranks(
    places: Sequence[Place], module: str, settings: Mapping[str, Any], folder: Path, *, timeout_seconds: float
) -> None:
    """Run ``python -m module SETTINGS`` as rank ``i`` at ``places[i]`` and wait for all.

    ``settings`` reach a rank as one JSON argument; what it prints goes to ``rank<i>.log`` in ``folder``.

    Raises:
        RuntimeError: where a rank fails or is late, with the ends of the logs. All ranks have ended by then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _PORT_IN_HOST if places[0].address != ThisMachine.address else free_port()
    processes: list[subprocess.Popen[Any]] = []
    with contextlib.ExitStack() as logs:
        try:
            for rank, place in enumerate(places):
                world = {"MASTER_ADDR": places[0].address, "MASTER_PORT": str(port), "WORLD_SIZE": str(len(places))}
                mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
                environment = {**os.environ, **place.environment, **world, **mine}
                log = logs.enter_context((folder / f"rank{rank}.log").open("w"))
                command = [sys.executable, "-m", module, json.dumps(settings)]
                processes.append(place.popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            codes, late = _wait(processes, timeout_seconds)
        finally:
            _end(processes)
    if late or any(codes):
        ends = "\n".join(f"--- rank {r}\n{(folder / f'rank{r}.log').read_text()[-2000:]}" for r in range(len(places)))
        how = f"not done after {timeout_seconds:g} s" if late else f"exit codes {codes} (None: ended by us)"
        raise RuntimeError(f"{module}: {how}\n{ends}")


def _wait(processes: Sequence[subprocess.Popen[Any]], seconds: float) -> tuple[list[int | None], bool]:
    """Exit codes once all have ended or one has failed (None where one still runs), and whether it took too long."""
    deadline = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return codes, False
        if time.monotonic() > deadline:
            return codes, True
        time.sleep(0.02)


def _end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
