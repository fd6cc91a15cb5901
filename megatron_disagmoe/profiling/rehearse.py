"""A plan made small and trained for a few steps on this machine: everything but its size is as it will be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.local_job import Job, run
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.plan_file import PlanFile, save_plan
from megatron_disagmoe.planner.scaled import Rehearsal, rehearsal
from megatron_disagmoe.profiling.trials import TIMEOUT, training_flags
from megatron_disagmoe.training_log import TrainingLog


@dataclass(frozen=True)
class Rehearsed:
    """The small plan and the losses it trained with; ``error`` where it did not."""

    small: Rehearsal
    losses: tuple[float, ...]
    error: str | None

    @property
    def trained(self) -> bool:
        """Every step was made, and the loss is a number."""
        return self.error is None and bool(self.losses) and all(loss == loss for loss in self.losses)


def rehearse(plans: list[tuple[PlanFile, ModelSpec]], folder: Path, *, steps: int = 3) -> list[Rehearsed]:
    """Scale each plan down and train it, one after the other, as processes of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs, small = [], []
    for number, (plan, model) in enumerate(plans):
        each = rehearsal(plan, model)
        path = folder / f"small-{number}.yaml"
        save_plan(each.plan, path)
        flags = training_flags(each.plan, each.model, path, steps=steps)
        jobs.append(Job(f"small-{number}", each.world_size, flags, timeout_seconds=TIMEOUT))
        small.append(each)
    found = []
    for each, result in zip(small, run(jobs, folder / "jobs"), strict=True):
        error = None
        try:
            result.checked()
        except RuntimeError as failed:
            error = str(failed)
        log = TrainingLog.read(result.output.splitlines())
        found.append(Rehearsed(each, tuple(step.fields["lm loss"] for step in log.steps), error))
    return found
