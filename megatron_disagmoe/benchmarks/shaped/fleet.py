"""Every variant's ranks alive at once, one host each, and one variant at a time taking a step.

The ranks are forked from this process, which has imported Megatron once, and each enters its host before it opens a
socket. They are real training runs held by ``gate`` between steps, so variants can be timed in turn (A B A B ...)
while the links stay what they are. Who is not in turn is stopped (SIGSTOP): gloo's threads poll a hundred times a
second each, and those of forty waiting ranks would take a core.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_disagmoe.benchmarks.hosts import Hosts
from megatron_disagmoe.benchmarks.shaped import gate
from megatron_disagmoe.benchmarks.shaped.cases import Model, Variant

_FIRST_PORT = 29500
_END_SECONDS = 5.0
_WAKE_SECONDS = 0.02  # from a rank's awakening to its step
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class StepTaken:
    """One step of one variant.

    Attributes:
        seconds: from the word to go to the last rank's report.
        cpu_seconds: of all ranks' processes.
        loss: of the step.
        bytes_sent: by each host's interface, headers included.
    """

    seconds: float
    cpu_seconds: float
    loss: float
    bytes_sent: tuple[int, ...]


@dataclass
class _Rank:
    pid: int
    go: int
    done: int
    log: Path
    ahead: bytes = b""
    code: int | None = None


class Fleet:
    """The ranks of ``variants`` on ``hosts``; use it in a ``with`` statement, which ends them all.

    Args:
        hosts: entered already; rank i of every variant lives on host i.
        model: what they train.
        variants: no two alike.
        folder: logs, and traces of the AF-pipe variants (``traces/NAME``).
        timeout_seconds: for one step, and for the start-up of one variant.
    """

    def __init__(
        self, hosts: Hosts, model: Model, variants: Sequence[Variant], folder: Path, *, timeout_seconds: float
    ) -> None:
        self.hosts, self.model, self.variants, self.folder = hosts, model, list(variants), folder
        self.timeout_seconds = timeout_seconds
        self._ranks: dict[Variant, list[_Rank]] = {}

    def __enter__(self) -> Self:
        import_once()
        try:
            for number, variant in enumerate(self.variants):
                self._ranks[variant] = self._start(variant, _FIRST_PORT + number)
                self._rest(variant, time.perf_counter() + self.timeout_seconds)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def traces(self, variant: Variant) -> Path:
        """Where an AF-pipe variant's traces lie, once the fleet has ended."""
        return self.folder / "traces" / variant.name

    def step(self, variant: Variant) -> StepTaken:
        """Let ``variant`` take one step.

        Raises:
            RuntimeError: where a rank ended or took too long, with the end of its output.
        """
        ranks = self._ranks[variant]
        self._wake(variant)
        before = [host.counters() for host in self.hosts]
        start = time.perf_counter()
        for rank in ranks:
            with contextlib.suppress(BrokenPipeError):  # it has ended: its report says so
                os.write(rank.go, gate.GO)
        reports = [self._report(variant, rank, start + self.timeout_seconds) for rank in ranks]
        seconds = time.perf_counter() - start
        after = [host.counters() for host in self.hosts]
        self._rest(variant, start + self.timeout_seconds)
        losses = [report["loss"] for report in reports if report["loss"] is not None]
        return StepTaken(
            seconds=seconds,
            cpu_seconds=sum(report["cpu_seconds"] for report in reports),
            loss=losses[-1],
            bytes_sent=tuple((b - a).sent for a, b in zip(before, after, strict=True)),
        )

    def _start(self, variant: Variant, port: int) -> list[_Rank]:
        ranks = []
        log_folder = self.folder / "logs" / variant.name
        log_folder.mkdir(parents=True, exist_ok=True)
        for rank, host in enumerate(self.hosts):
            go_read, go_write = os.pipe()
            done_read, done_write = os.pipe()
            log = log_folder / f"rank{rank}.log"
            world = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(len(self.hosts)),
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": self.hosts[0].address,
                "MASTER_PORT": str(port),
                **host.environment,
            }
            pid = os.fork()
            if pid == 0:
                self._be_rank(variant, rank, log, world, go_read, done_write)
            os.close(go_read)
            os.close(done_write)
            ranks.append(_Rank(pid, go_write, done_read, log))
        return ranks

    def _be_rank(self, variant: Variant, rank: int, log: Path, world: dict[str, str], go: int, done: int) -> None:
        code = 1
        try:
            for others in [*self._ranks.values()]:  # or a rank would not see its own gate close
                for other in others:
                    os.close(other.go)
                    os.close(other.done)
            # A stopped rank does not see its gate close: should the parent be killed, the kernel ends its ranks.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ.update(world)
            self.hosts[rank].enter()
            flags = variant.flags(self.model, len(self.hosts))
            if variant.is_af_pipe:
                flags += ["--af-trace-dir", str(self.traces(variant)), "--af-timeout-seconds", "300"]
            train(flags, go, done, one_copy=variant.system == "one-copy")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            if (error := sys.exception()) is not None:
                traceback.print_exception(error)
            with contextlib.suppress(OSError):
                os.close(done)
            os._exit(code)

    def _wake(self, variant: Variant) -> None:
        """Let its ranks run again, which wait at their gates."""
        for rank in self._ranks[variant]:
            os.kill(rank.pid, signal.SIGCONT)
        time.sleep(_WAKE_SECONDS)

    def _rest(self, variant: Variant, deadline: float) -> None:
        """Stop its ranks once all are at their gates."""
        for rank in self._ranks[variant]:
            line = self._line(variant, rank, deadline)
            assert line == gate.READY, f"a rank reports {line!r} where it should be at its gate"
        for rank in self._ranks[variant]:
            os.kill(rank.pid, signal.SIGSTOP)

    def _report(self, variant: Variant, rank: _Rank, deadline: float) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self._line(variant, rank, deadline))
        return report

    def _line(self, variant: Variant, rank: _Rank, deadline: float) -> bytes:
        """The next line of a rank, its end included."""
        while b"\n" not in rank.ahead:
            ready, _, _ = select.select([rank.done], [], [], max(0.0, deadline - time.perf_counter()))
            chunk = os.read(rank.done, 4096) if ready else b""
            if not chunk:
                how = "ended" if ready else f"did not get to its next step in {self.timeout_seconds:g} s"
                tails = "\n".join(f"--- {r.log}\n{r.log.read_text()[-2500:]}" for r in self._ranks[variant])
                raise RuntimeError(f"a rank of {variant.name} {how}\n{tails}")
            rank.ahead += chunk
        line, end, rank.ahead = rank.ahead.partition(b"\n")
        return line + end

    def _end(self) -> None:
        ranks = [rank for ranks in self._ranks.values() for rank in ranks]
        for rank in ranks:
            os.close(rank.go)
            os.close(rank.done)
            if not _reap(rank):
                os.kill(rank.pid, signal.SIGCONT)
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline and sum(map(_reap, ranks)) < len(ranks):
            time.sleep(0.05)
        for rank in ranks:
            if not _reap(rank):
                os.kill(rank.pid, signal.SIGKILL)
        for rank in ranks:
            while not _reap(rank):
                time.sleep(0.01)
        self._ranks.clear()


def _reap(rank: _Rank) -> bool:
    """Whether it has ended."""
    if rank.code is None:
        pid, status = os.waitpid(rank.pid, os.WNOHANG)
        if pid:
            rank.code = os.waitstatus_to_exitcode(status)
    return rank.code is not None


def import_once() -> None:
    """Everything the ranks would import; one thread a process from here on."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from megatron_disagmoe import cpu, upstream_fixes

    cpu.install_if_needed()
    upstream_fixes.install()
    import megatron_disagmoe.benchmarks.shaped.one_copy  # with it all of Megatron's MoE
    import megatron_disagmoe.gpt_task  # noqa: F401


def train(flags: list[str], go: int, done: int, *, one_copy: bool) -> None:
    """One rank's training run, held by its gate; in a process of its own."""
    import torch

    torch.set_num_threads(1)
    from megatron_disagmoe import gpt_task
    from megatron_disagmoe.preparation import prepare

    sys.argv = ["pretrain_gpt", *prepare(flags)]
    gate.install(go, done)
    if one_copy:
        from megatron_disagmoe.benchmarks.shaped import one_copy as rival

        rival.install()
    gpt_task.train()
