"""Runs vanilla Megatron and AF-pipe on one case and says how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.local_job import Job, run
from megatron_disagmoe.parity.cases import Case
from megatron_disagmoe.parity.step_values import ENVIRONMENT, StepValues, read

#: Largest relative difference allowed in loss and in gradient norm, by precision (docs/parity.md says why).
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 5e-1)}


@dataclass(frozen=True)
class Comparison:
    """Both runs, step by step."""

    case: Case
    vanilla: list[StepValues]
    af_pipe: list[StepValues]

    @property
    def max_relative_loss_difference(self) -> float:
        """Largest |difference| / vanilla over all steps; infinite where the steps do not correspond."""
        return _largest([s.loss for s in self.vanilla], [s.loss for s in self.af_pipe])

    @property
    def max_relative_grad_norm_difference(self) -> float:
        """Likewise for the gradient norm before clipping."""
        return _largest([s.grad_norm for s in self.vanilla], [s.grad_norm for s in self.af_pipe])

    @property
    def both_fall(self) -> bool:
        """Whether both losses end lower than they began."""
        return all(
            run and run[0].loss is not None and run[-1].loss is not None and run[-1].loss < run[0].loss
            for run in (self.vanilla, self.af_pipe)
        )

    @property
    def holds(self) -> bool:
        """Every step taken, both losses falling, differences within ``TOLERANCES``."""
        loss, grad_norm = TOLERANCES[self.case.dtype]
        return (
            len(self.vanilla) == len(self.af_pipe) == self.case.steps
            and self.both_fall
            and self.max_relative_loss_difference <= loss
            and self.max_relative_grad_norm_difference <= grad_norm
        )


def _largest(expected: Sequence[float | None], actual: Sequence[float | None]) -> float:
    if len(expected) != len(actual) or not expected:
        return math.inf
    worst = 0.0
    for want, have in zip(expected, actual, strict=True):
        if want is None or have is None:
            if want is not have:
                return math.inf
        elif not (math.isfinite(want) and math.isfinite(have)):
            return math.inf
        else:
            worst = max(worst, abs(have - want) / max(abs(want), 1e-12))
    return worst


def compare(cases: Sequence[Case], folder: Path) -> list[Comparison]:
    """Train both runs of every case; outputs go to folders below ``folder``. Equal vanilla runs are trained once.

    Raises:
        RuntimeError: where a run fails, with the end of its output.
    """
    jobs: dict[str, Job] = {}
    names: list[tuple[str, str]] = []
    known: dict[tuple[int, tuple[str, ...]], str] = {}
    for number, case in enumerate(cases):
        vanilla_run = (case.vanilla_world_size, tuple(case.vanilla_flags()))
        vanilla = known.setdefault(vanilla_run, f"vanilla-{number}")
        af_pipe = f"af-pipe-{number}"
        for name, world_size, flags in (
            (vanilla, case.vanilla_world_size, case.vanilla_flags()),
            (af_pipe, case.af_world_size, case.af_flags()),
        ):
            jobs.setdefault(name, _job(name, world_size, flags, folder))
        names.append((vanilla, af_pipe))
    for result in run(list(jobs.values()), folder):
        result.checked()
    return [
        Comparison(case, read(_values(folder, vanilla)), read(_values(folder, af_pipe)))
        for case, (vanilla, af_pipe) in zip(cases, names, strict=True)
    ]


def _job(name: str, world_size: int, flags: list[str], folder: Path) -> Job:
    _values(folder, name).unlink(missing_ok=True)
    environment = {ENVIRONMENT: str(_values(folder, name).resolve())}
    return Job(name=name, world_size=world_size, flags=flags, environment=environment, timeout_seconds=300.0)


def _values(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"
