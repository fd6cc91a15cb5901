"""A plan as a file: YAML that people read, ``disagmoe plan verify`` checks and ``--af-plan`` runs.

Everything that a run needs stands under ``flags`` (ours) and ``megatron_flags``; the rest says why, what to expect and
where each process sits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_disagmoe.builders.placement import placed
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import IN_TURN, Allocation, DispatchMode, Job, NodeLayout, ScheduleKind
from megatron_disagmoe.planner.files import (
    Count,
    CountOrZero,
    Quantity,
    QuantityOrZero,
    Strict,
    dump_yaml,
    read_mapping,
    validate,
)
from megatron_disagmoe.planner.layered_costs import LayeredCosts
from megatron_disagmoe.schedules.actions import Placement

FORMAT = "disagmoe-plan 1"

RecomputeName = Literal["none", "selective", "full"]


class Batch(Strict):
    """What a step trains."""

    sequence_length: Count
    global_batch_size: Count
    micro_batch_size: Count
    micro_batches: Count
    imbalance: Annotated[float, Field(ge=1, le=1e6)]


class Sizes(Strict):
    """GPUs and how they are grouped."""

    attention_groups: Count
    ffn_groups: Count
    attention_ranks: Count
    ffn_ranks: Count
    replicas: Count
    tensor_parallel: Count
    context_parallel: Count
    expert_tensor_parallel: Count
    gpus: Count


class Machines(Strict):
    """Which nodes and NICs. NICs are of all nodes; a share of one where every GPU owns an equal share."""

    attention_pool: str
    ffn_pool: str
    layout: Literal["separate", "paired", "spread"]
    nic_split: CountOrZero
    attention_nics: QuantityOrZero
    ffn_nics: QuantityOrZero
    nodes: Count


class Levers(Strict):
    """What trades time, memory and numbers."""

    dispatch: DispatchMode
    recompute_attention: RecomputeName
    recompute_ffn: RecomputeName
    redispatch: bool
    distributed_optimizer: bool
    bytes_per_parameter: Count


class ScheduleChoiceRecord(Strict):
    """Which order: ``builders.build`` makes it from these and the costs."""

    kind: ScheduleKind
    group_size: Count | None
    max_live: Count | None
    peak_live_attention: Count
    peak_live_ffn: Count


class StageTimes(Strict):
    """Seconds of stages that take equally long, by layer: ``0``, ``1-93``; backward includes what is run again."""

    stages: Annotated[str, Field(pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$")]
    forward: QuantityOrZero
    backward: QuantityOrZero
    weight: QuantityOrZero
    again: QuantityOrZero


class Costs(Strict):
    """Seconds of a micro-batch's stages and transfers; ``attention`` has A(0) .. A(L), the last is the tail."""

    attention: Annotated[tuple[StageTimes, ...], Field(min_length=1)]
    ffn: StageTimes
    m2n: QuantityOrZero
    n2m: QuantityOrZero
    lane: QuantityOrZero

    def stage_costs(self) -> LayeredCosts:
        """For builders and the event engine.

        Raises:
            ValueError: a stage is missing or there twice.
        """
        attention: dict[int, StageTimes] = {}
        for times in self.attention:
            for stage in numbers_of(times.stages):
                if stage in attention:
                    raise ValueError(f"costs.attention: stage {stage} is there twice")
                attention[stage] = times
        if set(attention) != set(range(len(attention))):
            raise ValueError(f"costs.attention: stages 0 to {max(attention)} are needed, got {sorted(attention)}")
        stages = [
            attention[number // 2] if number % 2 == 0 else self.ffn for number in range(2 * len(attention) - 1)
        ]
        return LayeredCosts.of(
            forward=[each.forward for each in stages],
            backward=[each.backward for each in stages],
            weight=[each.weight for each in stages],
            again=[each.again for each in stages],
            m2n=self.m2n,
            n2m=self.n2m,
            lane=self.lane,
        )


def numbers_of(ranges: str) -> list[int]:
    """``0-2,5`` as [0, 1, 2, 5]."""
    found: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if int(last or first) > 1_000_000:
            raise ValueError(f"{part}: no such stage")
        found += range(int(first), int(last or first) + 1)
    return found


def ranges_of(numbers: Sequence[int]) -> str:
    """The other way round; the order of ``numbers`` is kept."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


class Expected(Strict):
    """What the model predicts. ``fill_bound_s``: no schedule of these stages is faster."""

    step_time_s: Quantity
    pipeline_s: Quantity
    synchronise_s: QuantityOrZero
    fill_bound_s: Quantity
    tokens_per_second: Quantity
    mfu: Quantity


class MemoryRecord(Strict):
    """GB on the fullest GPU of a side."""

    parameters_and_gradients: QuantityOrZero
    optimizer: QuantityOrZero
    activations: QuantityOrZero
    workspace: QuantityOrZero
    transport: QuantityOrZero
    reserved: QuantityOrZero
    total: Quantity
    capacity: Quantity


class MemoryOfSides(Strict):
    """Both sides."""

    attention: MemoryRecord
    ffn: MemoryRecord


class Host(Strict):
    """Global ranks of one node, in the order of its GPUs; ``0-7,12``."""

    node: CountOrZero
    ranks: str
    roles: str


class PlanFile(Strict):
    """The whole plan.

    ``runs_here``: this version can run it; ``missing`` says what it lacks otherwise. ``reasons``: why each lever is on.
    """

    format: Literal["disagmoe-plan 1"] = "disagmoe-plan 1"
    model: str
    cluster: str
    batch: Batch
    sizes: Sizes
    machines: Machines
    levers: Levers
    schedule: ScheduleChoiceRecord
    expected: Expected
    memory_gb: MemoryOfSides
    flags: dict[str, int | str | bool]
    megatron_flags: tuple[str, ...]
    runs_here: bool
    missing: tuple[str, ...]
    reasons: tuple[str, ...]
    costs: Costs
    hosts: tuple[Host, ...]

    def job(self) -> Job:
        """The batch as the planner takes it."""
        b = self.batch
        return Job(b.sequence_length, b.global_batch_size, b.micro_batch_size, b.imbalance)

    def allocation(self, *, pools: tuple[str, ...]) -> Allocation:
        """The allocation on a cluster with these pools.

        Raises:
            ValueError: the cluster has no such pool.
        """
        m, lever = self.machines, self.levers
        for field, name in (("attention_pool", m.attention_pool), ("ffn_pool", m.ffn_pool)):
            if name not in pools:
                raise ValueError(f"machines.{field} {name!r}: the cluster has {', '.join(pools)}")
        return Allocation(
            **self.sizes.model_dump(exclude={"gpus"}),
            attention_pool=pools.index(m.attention_pool),
            ffn_pool=pools.index(m.ffn_pool),
            nodes=NodeLayout(m.layout),
            nic_split=m.nic_split,
            schedule=self.schedule.kind,
            group_size=self.schedule.group_size or 1,
            recompute_attention=Recompute[lever.recompute_attention.upper()],
            recompute_ffn=Recompute[lever.recompute_ffn.upper()],
            redispatch=lever.redispatch,
            dispatch=lever.dispatch,
            place_layers=str(self.flags.get("--af-place-layers", IN_TURN)),
        )

    def placement(self, num_layers: int) -> Placement:
        """Which group holds which stage: in turn, or as the flag ``--af-place-layers`` says.

        Raises:
            ValueError: the flag is for other sizes.
        """
        return placed(
            str(self.flags.get("--af-place-layers", "in-turn")),
            num_layers=num_layers,
            num_attention_groups=self.sizes.attention_groups,
            num_ffn_groups=self.sizes.ffn_groups,
            costs=self.costs.stage_costs(),
        )


def load_plan(path: str | Path) -> PlanFile:
    """A plan from its file.

    Raises:
        ValueError: naming the file and the field.
        OSError: not readable.
    """
    content = read_mapping(Path(path))
    known = content.get("format")
    if known != FORMAT:
        raise ValueError(f"{path}: format: not a plan of disagmoe plan (expected {FORMAT!r}, got {known!r})")
    return validate(PlanFile, content, source=str(path))


@functools.lru_cache(maxsize=4)
def read_plan(path: str) -> PlanFile:
    """``--af-plan``: as ``load_plan``, remembered.

    Raises:
        ValueError: not readable, or naming the field that is wrong.
    """
    try:
        return load_plan(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--af-plan {path}: {error}") from None


def save_plan(plan: PlanFile, path: str | Path) -> None:
    """Write ``plan`` as YAML; folders that are not there are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(dump_yaml(plan), encoding="utf-8")


def flags_of(plan: PlanFile) -> dict[str, Any]:
    """What ``--af-plan`` sets: names in Megatron's namespace (``af_attention_groups``, ...) and values."""
    return {name.removeprefix("--").replace("-", "_"): value for name, value in plan.flags.items()}
