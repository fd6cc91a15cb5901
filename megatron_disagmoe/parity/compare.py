"""Runs vanilla Megatron and AF-pipe on one case and says how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_disagmoe.local_job import Job, run
from megatron_disagmoe.parity import data, step_values
from megatron_disagmoe.parity.cases import Case
from megatron_disagmoe.parity.step_values import StepValues
from megatron_disagmoe.training_log import TrainingLog

#: Largest relative difference allowed in losses and in norms, by precision (docs/parity.md says why).
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 2e-2), "fp16": (2e-2, 2e-2)}

#: Fields of Megatron's log line that must be alike to the letter, and those that have no need to be: how long a step
#: took, and norms and losses rounded there that are compared in full precision.
_EXACT = ("consumed samples", "learning rate", "global batch size", "loss scale", "number of")
_LEFT_OUT = ("elapsed", "throughput", "grad norm", "params norm")


@dataclass(frozen=True)
class Run:
    """One training run: the steps of each rank, in order of rank, and what the last rank printed."""

    ranks: list[list[StepValues]]
    log: TrainingLog

    @property
    def steps(self) -> list[StepValues]:
        """The steps of the rank that holds the loss: the last one."""
        return self.ranks[-1] if self.ranks else []

    @property
    def falls(self) -> bool:
        """Whether the loss ends lower than it began; skipped steps aside."""
        losses = [step.loss for step in self.steps if step.loss is not None and not step.skipped]
        return len(losses) > 1 and losses[-1] < losses[0]

    def disagreement(self) -> str | None:
        """The first thing that two ranks have not alike."""
        for rank, steps in enumerate(self.ranks):
            for mine, last in zip(steps, self.steps, strict=False):
                for name in step_values.AGREED:
                    if getattr(mine, name) != getattr(last, name):
                        return (
                            f"step {last.iteration}: {name} is {getattr(mine, name)} on rank {rank}, "
                            f"{getattr(last, name)} on the last"
                        )
            if len(steps) != len(self.steps):
                return f"rank {rank} took {len(steps)} steps, the last rank {len(self.steps)}"
        return None


@dataclass(frozen=True)
class Comparison:
    """Both runs of a case."""

    case: Case
    vanilla_run: Run
    af_pipe_run: Run

    @property
    def vanilla(self) -> list[StepValues]:
        """Vanilla's steps."""
        return self.vanilla_run.steps

    @property
    def af_pipe(self) -> list[StepValues]:
        """AF-pipe's steps."""
        return self.af_pipe_run.steps

    @property
    def max_relative_loss_difference(self) -> float:
        """Largest |difference| / vanilla over all steps; infinite where the steps do not correspond."""
        return self._step_difference("loss")

    @property
    def max_relative_grad_norm_difference(self) -> float:
        """Likewise for the gradient norm before clipping."""
        return self._step_difference("grad_norm")

    @property
    def max_relative_validation_difference(self) -> float:
        """Likewise for the losses of all evaluations; 0 where there are none."""
        pair = [run.log.validations for run in (self.vanilla_run, self.af_pipe_run)]
        if not any(pair):
            return 0.0
        if [(v.iteration, v.split) for v in pair[0]] != [(v.iteration, v.split) for v in pair[1]]:
            return math.inf
        return largest_difference([v.loss for v in pair[0]], [v.loss for v in pair[1]])

    @cached_property
    def log_differences(self) -> dict[str, float]:
        """Every other field of Megatron's log line: largest relative difference; infinite where one run lacks it."""
        ours, theirs = self.af_pipe_run.log.steps, self.vanilla_run.log.steps
        names = {name for step in (*ours, *theirs) for name in step.fields if not name.startswith(_LEFT_OUT)}
        return {
            name: largest_difference([s.fields.get(name) for s in theirs], [s.fields.get(name) for s in ours])
            for name in sorted(names)
        }

    @property
    def both_fall(self) -> bool:
        """Whether both losses end lower than they began."""
        return self.vanilla_run.falls and self.af_pipe_run.falls

    @property
    def holds(self) -> bool:
        """Whether ``failures`` finds nothing."""
        return not self.failures()

    def failures(self) -> list[str]:
        """Everything that is not as it must be, one line each."""
        loss, norm = TOLERANCES[self.case.dtype]
        found = [
            f"{name} took {len(run.steps)} steps instead of {self.case.steps}"
            for name, run in (("Megatron", self.vanilla_run), ("AF-pipe", self.af_pipe_run))
            if len(run.steps) != self.case.steps
        ]
        if not self.both_fall:
            found.append("the losses do not fall")
        if disagreement := self.af_pipe_run.disagreement():
            found.append(disagreement)
        for what, difference, allowed in (
            ("loss", self.max_relative_loss_difference, loss),
            ("gradient norm", self.max_relative_grad_norm_difference, norm),
            ("validation loss", self.max_relative_validation_difference, loss),
            ("parameter norm", self._step_difference("params_norm"), loss),
            *((name, value, _allowed(name, loss, norm)) for name, value in self.log_differences.items()),
        ):
            if not difference <= allowed:
                found.append(f"{what}: relative difference {difference:.2e}, allowed {allowed:.0e}")
        return found

    def _step_difference(self, name: str) -> float:
        return largest_difference([getattr(s, name) for s in self.vanilla], [getattr(s, name) for s in self.af_pipe])


def _allowed(name: str, loss: float, norm: float) -> float:
    if name.startswith(_EXACT):
        return 0.0
    return loss if "loss" in name else norm


def largest_difference(expected: Sequence[float | None], actual: Sequence[float | None]) -> float:
    """Largest |difference| / expected; infinite for lists of other lengths, for a number that one list lacks, and
    for what is not finite in one of them only."""
    if len(expected) != len(actual) or not expected:
        return math.inf
    return max(_difference(want, have) for want, have in zip(expected, actual, strict=True))


def _difference(want: float | None, have: float | None) -> float:
    if want is None or have is None:
        return 0.0 if want is have else math.inf
    if not (math.isfinite(want) and math.isfinite(have)):
        return 0.0 if want == have or (math.isnan(want) and math.isnan(have)) else math.inf
    return 0.0 if want == have else abs(have - want) / max(abs(want), 1e-12)


def compare(cases: Sequence[Case], folder: Path) -> list[Comparison]:
    """Train both runs of every case; outputs go to folders below ``folder``. Equal vanilla runs are trained once.

    Raises:
        ValueError: for flags that a run refuses.
        RuntimeError: where a run fails, with the end of its output.
    """
    folder = folder.resolve()
    data.write(folder)
    jobs: dict[tuple[int, tuple[str, ...]], Job] = {}

    def job(kind: str, world_size: int, flags: list[str]) -> str:
        key = (world_size, tuple(flags))
        if key not in jobs:
            jobs[key] = _job(f"{kind}-{len(jobs)}", world_size, flags, folder)
        return jobs[key].name

    names = []
    for case in cases:
        case.write_schedule(folder)
        if case.start == "checkpoint":
            job("base", case.vanilla_world_size, case.base_flags(folder))
        names.append(
            (
                job("vanilla", case.vanilla_world_size, case.vanilla_flags(folder)),
                job("af-pipe", case.af_world_size, case.af_flags(folder)),
            )
        )
    results = {result.name: result.checked() for result in run(list(jobs.values()), folder)}
    runs = {
        name: Run(step_values.read(_values(folder, name)), TrainingLog.read(result.outputs[-1].splitlines()))
        for name, result in results.items()
    }
    return [
        Comparison(case, runs[vanilla], runs[af_pipe]) for case, (vanilla, af_pipe) in zip(cases, names, strict=True)
    ]


def _job(name: str, world_size: int, flags: list[str], folder: Path) -> Job:
    for old in _values(folder, name).glob("rank*.jsonl"):
        old.unlink()
    environment = {step_values.ENVIRONMENT: str(_values(folder, name))}
    return Job(name=name, world_size=world_size, flags=flags, environment=environment, timeout_seconds=300.0)


def _values(folder: Path, name: str) -> Path:
    return folder / name / "steps"
