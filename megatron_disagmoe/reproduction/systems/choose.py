"""A baseline at its best: pipeline ranks, virtual stages and recomputation searched under the memory limit."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.states import state_level
from megatron_disagmoe.reproduction.constants import Constants
from megatron_disagmoe.reproduction.systems.dualpipe import DualPipe
from megatron_disagmoe.reproduction.systems.layer import Costs, Job, Keep, costs_of
from megatron_disagmoe.reproduction.systems.memory import held, peak_bytes, synchronise_seconds
from megatron_disagmoe.reproduction.systems.pipeline import Shape, chunk_sizes, peak_live
from megatron_disagmoe.reproduction.systems.result import Result
from megatron_disagmoe.reproduction.systems.serial import Serial


@dataclass(frozen=True)
class Task:
    """What every system is given alike. ``batch``: sequences of a step; ``imbalance`` as in the planner."""

    model: ModelSpec
    cluster: Cluster
    sequence: int
    batch: int
    constants: Constants
    imbalance: float = 1.0

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence

    @classmethod
    def usual(cls, model: ModelSpec, cluster: Cluster, sequence: int, constants: Constants) -> Task:
        """With as many sequences a GPU as the constants say."""
        return cls(model, cluster, sequence, constants.sequences_per_gpu * cluster.num_gpus, constants)


@dataclass(frozen=True)
class Candidate:
    """One way to run a system that fits its memory."""

    costs: Costs
    shape: Shape
    replicas: int
    peak: float


#: (TP, CP) of a system's attention; more GPUs, up to 8, share a sequence where memory asks for it.
CUTS = tuple((tp, cp) for tp in (1, 2, 4, 8) for cp in (1, 2, 4, 8) if tp * cp <= 8)


def cuts(task: Task) -> list[tuple[int, int]]:
    """Those that model, sequence and expert-parallel group allow."""
    attention, parallel = task.model.attention, task.constants.expert_parallel
    return [
        (tp, cp)
        for tp, cp in CUTS
        if tp <= attention.tensor_parallel_limit
        and attention.num_heads % tp == 0
        and parallel % (tp * cp) == 0
        and task.sequence % (2 * tp * cp) == 0
    ]


def job_of(system: Serial, task: Task, keep: Keep, *, cut: tuple[int, int] = (1, 1)) -> Job:
    """The co-located job as this system does it."""
    c = task.constants
    return system.job(
        Job(
            task.model,
            task.cluster,
            task.sequence,
            c.micro_batch_size,
            c.expert_parallel,
            keep,
            nccl=1 / c.af_over_nccl,
            imbalance=task.imbalance,
            tensor_parallel=cut[0],
            context_parallel=cut[1],
        )
    )


@dataclass(frozen=True)
class Way:
    """A shape and a cut, whether it fits or not; costs by what is kept, from the least recomputation on."""

    costs: dict[Keep, Costs]
    shape: Shape
    replicas: int


def ways(system: Serial, task: Task, possible: list[tuple[int, int]]) -> Iterator[Way]:
    """Every number of pipeline ranks and virtual stages with each of these cuts."""
    c = task.constants
    parts = task.cluster.num_gpus // c.expert_parallel
    for cut in possible:
        costs = {keep: costs_of(job_of(system, task, keep, cut=cut)) for keep in system.keeps}
        for ranks in (p for p in range(1, parts + 1) if parts % p == 0):
            replicas = parts // ranks
            per_micro_batch = c.micro_batch_size * c.expert_parallel // (cut[0] * cut[1]) * replicas
            if task.batch % per_micro_batch:
                continue
            for chunks in system.shapes(ranks, task.model.num_moe_layers):
                shape = Shape(ranks, chunks, task.batch // per_micro_batch)
                if not isinstance(system, DualPipe) or system.fits(shape):
                    yield Way(costs, shape, replicas)


@functools.lru_cache(maxsize=256)
def _peaks(system: Serial, shape: Shape) -> list[dict[int, int]]:
    """``peak_live`` of every rank: the same whatever a cut costs."""
    return [peak_live(system.works(shape, rank)) for rank in range(shape.ranks)]


def fitting(system: Serial, task: Task, way: Way) -> Candidate | None:
    """With the least recomputation that fits; None where nothing does."""
    gpu, shape = task.cluster.pools[0].gpu, way.shape
    state = state_level(gpu.dtype, task.constants.bytes_per_parameter)
    live = _peaks(system, shape)
    for costs in way.costs.values():
        sizes = chunk_sizes(costs, shape.chunks)
        peak = peak_bytes(costs, shape, sizes, live, state=state, replicas=way.replicas, copies=system.copies)
        if peak <= gpu.memory_gb * 1e9:
            return Candidate(costs, shape, way.replicas, peak)
    return None


def best(system: Serial, task: Task) -> Result | None:
    """The fastest that fits; None where nothing does."""
    found = best_candidate(system, task)
    return found[0] if found else None


def best_candidate(system: Serial, task: Task) -> tuple[Result, Candidate] | None:
    """The fastest that fits, with the least recomputation that does for each shape and cut; None where nothing does.

    Where cuts aren't free, only the smallest that fits in some shape.
    """
    possible = cuts(task)
    if task.constants.free_cuts:
        return _fastest(system, task, possible)
    for size in sorted({tp * cp for tp, cp in possible}):
        found = _fastest(system, task, [cut for cut in possible if cut[0] * cut[1] == size])
        if found:
            return found
    return None


def _fastest(system: Serial, task: Task, possible: list[tuple[int, int]]) -> tuple[Result, Candidate] | None:
    """In order of the least that each could take with nothing recomputed, until none can be faster."""
    every = [(system.least_seconds(way.costs[system.keeps[0]], way.shape), way) for way in ways(system, task, possible)]
    found: tuple[Result, Candidate] | None = None
    for least, way in sorted(every, key=lambda each: each[0]):
        if found is not None and least >= found[0].step_seconds:
            break
        candidate = fitting(system, task, way)
        if candidate is None:
            continue
        if found is not None and system.least_seconds(candidate.costs, way.shape) >= found[0].step_seconds:
            continue
        result = run(system, task, candidate)
        if found is None or result.step_seconds < found[0].step_seconds:
            found = result, candidate
    return found


def run(system: Serial, task: Task, candidate: Candidate) -> Result:
    """One candidate's step."""
    costs, shape = candidate.costs, candidate.shape
    sizes = chunk_sizes(costs, shape.chunks)
    c = task.constants
    state = state_level(task.cluster.pools[0].gpu.dtype, c.bytes_per_parameter)
    parameters = held(costs, shape, sizes, copies=system.copies)
    after = synchronise_seconds(
        costs, parameters, state=state, replicas=candidate.replicas, copies=system.copies
    )
    step = system.step(costs, shape)
    return Result(
        system=system.name,
        step_seconds=step.seconds + after,
        pipeline_seconds=step.seconds,
        exposed_seconds=step.exposed,
        bubble_seconds=step.bubble,
        peak_bytes=candidate.peak,
        tokens=task.tokens,
        num_gpus=task.cluster.num_gpus,
        choice={
            "pipeline_ranks": shape.ranks,
            "virtual_stages": shape.chunks_per_rank,
            "micro_batches": shape.micro_batches,
            "replicas": candidate.replicas,
            "tensor_parallel": costs.job.tensor_parallel,
            "context_parallel": costs.job.context_parallel,
            "recompute": costs.job.keep.value,
        },
    )


def with_sizes(task: Task, **constants: float) -> Task:
    """The same with other constants."""
    changed = task.constants
    for name, value in constants.items():
        changed = changed.with_(name, value)
    return replace(task, constants=changed)
