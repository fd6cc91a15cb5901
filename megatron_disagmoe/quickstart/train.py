"""Run one of the quickstart's jobs, show its progress, and read what it logged."""

from __future__ import annotations

import collections
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_disagmoe.quickstart import dataset
from megatron_disagmoe.quickstart.child import running
from megatron_disagmoe.quickstart.jobs import ENVIRONMENT, Job, command
from megatron_disagmoe.quickstart.progress import StepProgress
from megatron_disagmoe.training_log import TrainingLog

_LAST_LINES = 25
#: Where torchrun's long report of a dead worker begins; what the worker itself said stands before it.
_TORCHRUN_SUMMARY = re.compile(r"torch/distributed/elastic/multiprocessing/api\.py.* failed \(exitcode")


class Failed(Exception):
    """A child ended badly; the text says which, how far it came, and shows the end of its output."""


@dataclass(frozen=True)
class Trained:
    """What a finished job left: its records, its folder of checkpoints, wall time with start-up in seconds."""

    job: Job
    log: TrainingLog
    checkpoints: Path
    seconds: float


def prepare_data(folder: Path, *, log: Path, console: Console) -> None:
    """Write the data set into ``folder`` unless it is there already; raises ``Failed``."""
    if dataset.is_prepared(folder):
        console.print(f"Data: as prepared before, in {folder}", highlight=False)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with console.status("Preparing the data"):
        _run([sys.executable, "-m", "megatron_disagmoe.quickstart.dataset", str(folder)], "Preparing the data", log=log)
    console.print(f"Data: {dataset.describe(folder)}", highlight=False)


def train(job: Job, *, steps: int, data: Path, folder: Path, console: Console) -> Trained:
    """Run ``job`` to its end in ``folder``; raises ``Failed`` with the end of its log where it does not get there."""
    folder.mkdir(parents=True)
    log_path, checkpoints = folder / "log.txt", folder / "checkpoint"
    words = command(job, steps=steps, data=data, checkpoints=checkpoints)
    variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    (folder / "command.sh").write_text(f"{variables} {shlex.join(words)}\n")
    begun, log = time.monotonic(), TrainingLog()
    with StepProgress(job, steps=steps, console=console) as progress:
        _run(words, job.title, log=log_path, each_line=lambda line: progress.show(log.add(line)))
    if len(log.steps) < steps or not log.validations:
        raise Failed(
            f"{job.title} ended with exit code 0 but logged {len(log.steps)} of {steps} steps and "
            f"{len(log.validations)} validations: see {log_path}"
        )
    return Trained(job, log, checkpoints, time.monotonic() - begun)


def _run(words: Sequence[str], what: str, *, log: Path, each_line: Callable[[str], None] = lambda line: None) -> None:
    last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    summary_begun = False
    with running(words, log=log, environment=ENVIRONMENT) as (child, lines):
        for line in lines:
            summary_begun = summary_begun or _TORCHRUN_SUMMARY.search(line) is not None
            if not summary_begun:
                last.append(line)
            each_line(line)
        code = child.wait()
    if code != 0:
        ending = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise Failed(f"{what} {ending}. The end of its output:\n\n{''.join(last)}\nAll of it: {log}")
