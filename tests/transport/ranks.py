"""Start a few real processes, run a function on each as a rank of one gloo world, reap them all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "megatron_disagmoe.transport.torch_backend"])


@dataclass
class Outcome:
    """How a rank ended: ``value`` if its function returned, ``error`` ("Type: message") if it raised."""

    value: Any = None
    error: str | None = None
    exit_code: int | None = None
    seconds: float = 0.0


def _main(
    rank: int, world_size: int, store: str, connection: Connection, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    start = time.monotonic()
    try:
        outcome = Outcome(value=function(rank, *args))
    except (
        RuntimeError,
        ValueError,
        AssertionError,
        IndexError,
        TypeError,
    ) as error:  # whatever a rank raises is what the test looks at
        traceback.print_exc()
        outcome = Outcome(error=f"{type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - start
    connection.send_bytes(pickle.dumps(outcome))  # the plain one: tensors by value
    connection.close()


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    seconds: float = 50,
    wait_for: Sequence[int] | None = None,
) -> list[Outcome]:
    """Run ``function(rank, *args)`` on ``world_size`` processes and return how each ended.

    A process that outlives ``seconds``, or all of those in ``wait_for``, is killed and has exit code -9; none is
    left behind.
    """
    awaited = range(world_size) if wait_for is None else wait_for
    deadline = time.monotonic() + seconds
    outcomes = [Outcome() for _ in range(world_size)]
    with tempfile.TemporaryDirectory() as folder:
        processes, connections = [], []
        try:
            for rank in range(world_size):
                ours, theirs = _CONTEXT.Pipe(duplex=False)
                arguments = (rank, world_size, str(Path(folder) / "store"), theirs, function, args)
                process = _CONTEXT.Process(target=_main, args=arguments)
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
            for rank in awaited:
                connection = connections[rank]
                if connection.poll(max(deadline - time.monotonic(), 0)):
                    with contextlib.suppress(EOFError):  # it died without a word: the exit code says how
                        outcomes[rank] = pickle.loads(connection.recv_bytes())
            for rank in awaited:
                processes[rank].join(max(deadline - time.monotonic(), 0))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    for outcome, process in zip(outcomes, processes, strict=True):
        outcome.exit_code = process.exitcode
    return outcomes


def values(outcomes: list[Outcome]) -> list[Any]:
    """The returned values; fails where a rank raised or died."""
    for rank, outcome in enumerate(outcomes):
        assert (outcome.error, outcome.exit_code) == (None, 0), f"rank {rank}: {outcome}"
    return [outcome.value for outcome in outcomes]


@contextlib.contextmanager
def no_shared_memory_left() -> Iterator[None]:
    """Fails where the block leaves something in shared memory that no living process uses."""
    before = set(os.listdir("/dev/shm"))
    yield
    new = set(os.listdir("/dev/shm")) - before
    assert not {name for name in new if name not in _all_maps()}


def _all_maps() -> str:
    """What all processes have mapped."""
    maps = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            maps.append(path.read_text())
    return "".join(maps)
