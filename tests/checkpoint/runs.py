"""A tiny model trained a few steps, saved half-way: the flags, and what every rank saw in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_disagmoe.local_job import Job
from megatron_disagmoe.parity import data
from megatron_disagmoe.parity.cases import Case
from megatron_disagmoe.parity.step_values import ENVIRONMENT, StepValues, read

SAVED, STEPS = 2, 4
"""Steps before the checkpoint, and in all."""


def case(sizes: str, flags: str = "", *, layers: int = 2, dtype: str = "fp32") -> Case:
    """A case by its sizes: ``"2 1 1 1"`` is p, M, N, R and ``"1-2 1 1 1"`` has p_A 1 and p_F 2."""
    groups, attention_ranks, ffn_ranks, replicas = sizes.split()
    attention_groups, _, ffn_groups = groups.partition("-")
    return Case(
        attention_groups=int(attention_groups),
        ffn_groups=int(ffn_groups) if ffn_groups else None,
        attention_ranks=int(attention_ranks),
        ffn_ranks=int(ffn_ranks),
        replicas=int(replicas),
        layers=layers,
        steps=STEPS,
        dtype=dtype,
        extra=("--global-batch-size", "8", *flags.split()),
    )


class Runs:
    """Jobs below one folder: ``add`` them, run ``jobs``, then ask for what they saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Job] = []
        data.write(folder)

    def af_pipe(self, name: str, case: Case, *flags: str) -> None:
        """Add a job of ``case`` with AF-pipe."""
        self._add(name, case.af_world_size, [*case.af_flags(self.folder), *flags])

    def vanilla(self, name: str, case: Case, *flags: str, expert_parallel: int = 1) -> None:
        """Add a job of plain Megatron that ``case`` equals, its experts over ``expert_parallel`` ranks."""
        parallel = ("--expert-model-parallel-size", str(expert_parallel))
        self._add(name, case.vanilla_world_size, [*case.vanilla_flags(self.folder), *parallel, *flags])

    def _add(self, name: str, world_size: int, flags: Sequence[str]) -> None:
        environment = {ENVIRONMENT: str(self.folder / "values" / name)}
        self.jobs.append(Job(name, world_size, list(flags), environment=environment))

    def saving(self, name: str) -> tuple[str, ...]:
        """Flags that save after ``SAVED`` and after all ``STEPS``."""
        return "--save", str(self.folder / "saved" / name), "--save-interval", str(SAVED)

    def loading(self, name: str) -> tuple[str, ...]:
        """Flags that load what job ``name`` has saved after ``SAVED`` steps."""
        return "--load", str(self.folder / "saved" / name), "--ckpt-step", str(SAVED)

    def checkpoint(self, name: str, step: int = STEPS) -> Path:
        """The checkpoint that job ``name`` has saved after ``step`` steps."""
        return self.folder / "saved" / name / f"iter_{step:07d}"

    def steps(self, name: str) -> list[list[StepValues]]:
        """What each rank of a job saw, step by step."""
        return read(self.folder / "values" / name)

    def seen_with_loss(self, name: str) -> list[StepValues]:
        """The steps of the last rank, which has the loss."""
        return self.steps(name)[-1]
