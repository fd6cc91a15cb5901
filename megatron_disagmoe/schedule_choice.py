"""Which schedule a run follows: a builder by name or a file; always verified first. No torch, no Megatron."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.schedules.actions import Group, Kind, Placement, Schedule
from megatron_disagmoe.schedules.dataflow import redispatched
from megatron_disagmoe.schedules.text import load
from megatron_disagmoe.schedules.verifier import UnsafeScheduleError, ensure_safe
from megatron_disagmoe.simulator.costs import StageCosts

#: Builders that ``--af-schedule`` knows by name; ``builders.KINDS`` is the same list, and importing it takes longer.
NAMES = ("interleaved-1f1b", "split-backward", "sequential")

#: What evaluation follows where training follows a file.
_FORWARD_ONLY = "interleaved-1f1b"


@dataclass(frozen=True)
class ScheduleChoice:
    """What the flags ask for.

    Attributes:
        name: one of ``NAMES``, or the path of a schedule file.
        group_size: ``--af-micro-batch-group-size``, for the interleaved kinds.
        max_live: ``--af-max-live-micro-batches``.
        redispatch: ``--af-redispatch``.
        recompute_attention, recompute_ffn: which side ``--af-recompute`` names; builders make room for it.
        plan: ``--af-plan``; its stage times are what builders order by.
        tail: forward time of the tail in attention stages, where there is no plan.
    """

    name: str
    group_size: int | None = None
    max_live: int | None = None
    redispatch: bool = False
    recompute_attention: bool = False
    recompute_ffn: bool = False
    plan: str | None = None
    tail: float = 0.0

    @property
    def redispatches(self) -> bool:
        """Whether a step dispatches anything twice.

        Raises:
            ValueError: where there is a file and it cannot be read.
        """
        return self.redispatch or (self.is_file and bool(redispatched(_load(self.name))))

    @property
    def is_file(self) -> bool:
        """Whether a file says it all."""
        return self.name not in NAMES

    def placement(self) -> Placement:
        """The placement that the file states.

        Raises:
            ValueError: where it cannot be read.
        """
        assert self.is_file, "a builder takes the placement, a file gives it"
        return _load(self.name).placement


@dataclass(frozen=True)
class StepSchedule:
    """The schedule of a step, safe to run.

    Attributes:
        schedule: with its transfers.
        peak_live: the most activations each group holds.
        again: the FFN stages and micro-batches that are dispatched twice.
        is_split: whether some backward is in two parts.
    """

    schedule: Schedule
    peak_live: dict[Group, int]
    again: frozenset[tuple[int, int]]
    is_split: bool


@functools.lru_cache(maxsize=64)
def step_schedule(
    choice: ScheduleChoice, placement: Placement, num_micro_batches: int, *, forward_only: bool
) -> StepSchedule:
    """The schedule of a step; the same on every rank.

    Evaluation of a run that follows a file is built for the file's placement.

    Raises:
        ValueError: where there is no such schedule, or the file is for another number of micro-batches.
        UnsafeScheduleError: where it is not safe to run; the message draws every fault.
    """
    if choice.is_file and not forward_only:
        schedule = _from_file(choice, placement, num_micro_batches)
    else:
        schedule = _built(choice, placement, num_micro_batches, forward_only=forward_only)
    try:
        report = ensure_safe(schedule, max_live=None if forward_only else choice.max_live)
    except UnsafeScheduleError as error:
        raise UnsafeScheduleError(f"--af-schedule {choice.name}: {error}") from None
    is_split = any(action.kind is Kind.I for actions in report.schedule.actions.values() for action in actions)
    return StepSchedule(report.schedule, report.peak_live, redispatched(report.schedule), is_split)


def _built(choice: ScheduleChoice, placement: Placement, num_micro_batches: int, *, forward_only: bool) -> Schedule:
    from megatron_disagmoe import builders

    group_size = choice.group_size
    symmetric = placement.num_attention_groups == placement.num_ffn_groups
    if group_size is None and choice.max_live is None and symmetric and choice.plan is None and not choice.tail:
        # Without measured times one round of the ring, communication counted as stages, is the size to take.
        group_size = 4 * placement.num_attention_groups
    costs = stage_costs(choice, placement.num_layers)
    return builders.build(
        _FORWARD_ONLY if choice.is_file else choice.name,
        placement,
        num_micro_batches=num_micro_batches,
        costs=costs,
        group_size=group_size,
        max_live=None if forward_only else choice.max_live,
        forward_only=forward_only,
        redispatch=choice.redispatch and not forward_only,
    )


def stage_costs(choice: ScheduleChoice, num_layers: int) -> StageCosts:
    """What builders order by: the plan's stage times, else all stages alike but the tail.

    Raises:
        ValueError: where the plan is for another number of layers, or cannot be read.
    """
    from megatron_disagmoe import builders

    if choice.plan is None:
        return dataclasses.replace(
            builders.NOMINAL_COSTS,
            tail=choice.tail,
            recompute_attention=float(choice.recompute_attention),
            recompute_ffn=float(choice.recompute_ffn),
        )
    from megatron_disagmoe.planner.plan_file import read_plan

    costs = read_plan(choice.plan).costs.stage_costs()
    if costs.num_layers != num_layers:
        raise ValueError(
            f"--af-plan {choice.plan} is for {costs.num_layers} MoE layers, but the model has {num_layers}: "
            f"make one for it (disagmoe plan --model ...)"
        )
    return costs


def _from_file(choice: ScheduleChoice, placement: Placement, num_micro_batches: int) -> Schedule:
    schedule = _load(choice.name)
    if schedule.forward_only:
        raise ValueError(f"--af-schedule {choice.name} is forward only; training needs backward actions")
    if schedule.num_micro_batches != num_micro_batches:
        raise ValueError(
            f"--af-schedule {choice.name} is for {schedule.num_micro_batches} micro-batches, but a step of this run "
            f"has {num_micro_batches} (--global-batch-size / (--micro-batch-size x attention ranks x replicas)): "
            f"make them equal"
        )
    assert schedule.placement == placement, "the topology is made from the file"
    return schedule


@functools.lru_cache(maxsize=4)
def _load(path: str) -> Schedule:
    if not Path(path).is_file():
        raise ValueError(
            f"--af-schedule {path!r} is neither one of {', '.join(NAMES)} nor a file; name one of them, or write a "
            f"file with disagmoe schedule build"
        )
    try:
        return load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--af-schedule {path}: {error}") from None
