"""Run training jobs of a few ranks on this machine, cheaply: import once, fork every rank.

What torchrun does for tests and for ``disagmoe parity``, at a fraction of the start-up: importing torch and Megatron
takes longer than 20 steps of a tiny model, and here all ranks of all jobs share one import. CPU only (a forked
process cannot use CUDA).

    results = run([Job(name="vanilla", world_size=2, flags=[...]), ...], directory)

``run`` starts a process that does the forking, so the caller needs no torch and stays unforked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_disagmoe.free_port import free_port

KILL_AFTER_SECONDS = 5.0
"""From SIGTERM to SIGKILL, for the ranks left when one has failed."""


@dataclass(frozen=True)
class Job:
    """``world_size`` ranks of ``megatron_disagmoe.pretrain_gpt`` with ``flags``, or of ``script`` through the launcher.

    ``timeout_seconds`` counts from the fork; ``environment`` is set in the ranks alone.
    """

    name: str
    world_size: int
    flags: list[str]
    script: str | None = None
    timeout_seconds: float = 120.0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a job ended: per rank the exit code (negative: the signal), and the output of each rank.

    ``left_over`` names the processes that a rank had started and not ended; they have been killed.
    """

    name: str
    exit_codes: list[int]
    outputs: list[str]
    seconds: float
    timed_out: bool
    left_over: list[int]

    @property
    def output(self) -> str:
        """All ranks' output, rank after rank."""
        return "".join(self.outputs)

    def checked(self) -> Result:
        """This result.

        Raises:
            ValueError: what the plugin refused, where a rank ended with exit code 2.
            RuntimeError: otherwise, unless every rank ended well and alone, with the ends of the outputs.
        """
        if 2 in self.exit_codes and len(said := re.split(r"^disagmoe: ", self.output, flags=re.MULTILINE)) > 1:
            raise ValueError(said[-1].strip())
        if any(self.exit_codes) or self.timed_out or self.left_over:
            tails = "\n".join(f"--- rank {rank}\n{output[-3000:]}" for rank, output in enumerate(self.outputs))
            raise RuntimeError(
                f"job {self.name}: exit codes {self.exit_codes}{', timed out' if self.timed_out else ''}"
                f"{f', left processes {self.left_over}' if self.left_over else ''}\n{tails}"
            )
        return self


def run(jobs: Sequence[Job], directory: Path, *, environment: dict[str, str] | None = None) -> list[Result]:
    """Run ``jobs`` one after the other; specification and rank outputs lie in ``directory``.

    ``RuntimeError`` where the process that forks the ranks fails itself; a failed job is a ``Result`` like another.
    """
    directory.mkdir(parents=True, exist_ok=True)
    specification = directory / "jobs.json"
    specification.write_text(json.dumps([asdict(job) for job in jobs]))
    root = Path(__file__).resolve().parents[1]
    start = f"import sys; sys.path.append({str(root)!r}); from megatron_disagmoe.local_job import main; main()"
    command = [sys.executable, "-c", start, str(specification)]
    limit = 60 + sum(job.timeout_seconds + 2 * KILL_AFTER_SECONDS for job in jobs)
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except BaseException:
        process.terminate()  # it takes its ranks along
        process.communicate()
        raise
    results = directory / "results.json"
    if process.returncode != 0 or not results.is_file():
        raise RuntimeError(f"forking the ranks of {specification} ended with {process.returncode}:\n{output[-4000:]}")
    return [Result(**result) for result in json.loads(results.read_text())]


def main() -> None:
    """Entry of the forking process: read jobs, import, run them, write ``results.json`` beside."""
    specification = Path(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = [Job(**job) for job in json.loads(specification.read_text())]
    _import_once(jobs)
    directory = specification.parent
    results = [_run_one(job, directory / job.name) for job in jobs]
    (directory / "results.json").write_text(json.dumps([asdict(result) for result in results]))


def _import_once(jobs: Sequence[Job]) -> None:
    """Everything the ranks would import, as long as all jobs take Megatron from the same place."""
    if any(job.script is not None for job in jobs):
        return  # its folder may hold a Megatron of its own
    from megatron_disagmoe import cpu, upstream_fixes

    cpu.install_if_needed()
    upstream_fixes.install()
    import megatron_disagmoe.gpt_task  # noqa: F401


def _run_one(job: Job, directory: Path) -> Result:
    directory.mkdir(parents=True, exist_ok=True)
    outputs = [directory / f"rank{rank}.log" for rank in range(job.world_size)]
    start = time.monotonic()
    port = free_port()
    pids = [_fork_rank(job, rank, port, outputs[rank]) for rank in range(job.world_size)]
    codes: dict[int, int] = {}
    try:
        timed_out = _wait(pids, codes, start + job.timeout_seconds)
    finally:
        left_over = _end(pids, codes)
    return Result(
        name=job.name,
        exit_codes=[codes[pid] for pid in pids],
        outputs=[path.read_text(errors="replace") for path in outputs],
        seconds=time.monotonic() - start,
        timed_out=timed_out,
        left_over=left_over,
    )


def _fork_rank(job: Job, rank: int, port: int, output: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _be_rank(job, rank, port, output)
    return pid


def _be_rank(job: Job, rank: int, port: int, output: Path) -> None:
    import multiprocessing.util

    os.setsid()  # a group of its own, so that what it starts can be found and ended
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **job.environment,
    )
    code = 1
    try:
        _train(job)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if (error := sys.exception()) is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # As at the end of a process that is not forked: ends the managers that checkpointing has started.
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        os._exit(code)


def _train(job: Job) -> None:
    if job.script is None:
        from megatron_disagmoe import pretrain_gpt

        sys.argv = ["pretrain_gpt", *job.flags]
        pretrain_gpt.main()
    else:
        from megatron_disagmoe import launch

        launch.main([job.script, *job.flags])


def _wait(pids: list[int], codes: dict[int, int], deadline: float) -> bool:
    """Until all ranks have ended, or one has failed, or it is late (then True)."""
    while len(codes) < len(pids):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.02)
        _reap(pids, codes)
        if any(codes.values()):
            return False
    return False


def _end(pids: list[int], codes: dict[int, int]) -> list[int]:
    """End the ranks that still run, then whatever ranks have left behind; the pids of the latter."""
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + KILL_AFTER_SECONDS
    while len(codes) < len(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
        _reap(pids, codes)
    left_over = [pid for group in pids for pid in _members(group) if pid not in pids]
    for group in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    while len(codes) < len(pids):
        time.sleep(0.02)
        _reap(pids, codes)
    return left_over


def _reap(pids: list[int], codes: dict[int, int]) -> None:
    for pid in pids:
        if pid not in codes:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)


def _members(group: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                # Fields after the command, which may hold spaces: state, parent, process group.
                state, _, of_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(of_group) == group and state != "Z":
                    members.append(int(entry.name))
    return members
