"""One allocation in full: stage costs for the event engine, memory by what it is, bounds, utilisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import DISPATCH_MODES, IN_TURN, SCHEDULE_KINDS, Allocation, NodeLayout
from megatron_disagmoe.planner.arrays import Floats
from megatron_disagmoe.planner.layered_costs import LayeredCosts
from megatron_disagmoe.planner.layout import Geometry
from megatron_disagmoe.planner.links import Links, geometry_of, links_of
from megatron_disagmoe.planner.live import live_counts
from megatron_disagmoe.planner.memory import Memory, SideMemory, memory_of, num_micro_batches
from megatron_disagmoe.planner.objective import (
    Stages,
    fill_bound,
    pipeline_seconds,
    stages_of,
)
from megatron_disagmoe.planner.operations import model_flops
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import FFN_LEVERS, LAYOUTS, Candidates
from megatron_disagmoe.planner.synchronise import synchronise_seconds
from megatron_disagmoe.schedules.actions import Placement


@dataclass(frozen=True)
class GroupMemory:
    """Bytes on the fullest GPU of a group."""

    parameters_and_gradients: float
    optimizer: float
    activations: float
    workspace: float
    transport: float
    reserved: float
    kept_per_live: float
    live: int

    @property
    def total(self) -> float:
        """With what is reserved for context and communicators."""
        parts = self.parameters_and_gradients + self.optimizer + self.activations + self.workspace + self.transport
        return parts + self.reserved

    def with_live(self, live: int, *, extra: float = 0.0) -> GroupMemory:
        """The same with another live count, and ``extra`` bytes of activations."""
        return replace(self, live=live, activations=live * self.kept_per_live + extra)

    def most_live(self, usable: float) -> int:
        """The most micro-batch-layers that fit ``usable`` bytes, reserve not counted; below 0 where nothing does."""
        return int((usable - (self.total - self.reserved - self.activations)) // self.kept_per_live)


@dataclass(frozen=True)
class Evaluation:
    """What an allocation costs. Seconds and bytes; ``links`` and ``stages`` have one entry."""

    problem: Problem
    allocation: Allocation
    geometry: Geometry
    links: Links
    stages: Stages
    candidate: Candidates
    pipeline_seconds: float
    fill_bound: float
    synchronise_seconds: float
    attention_first: GroupMemory
    attention_tail: GroupMemory
    ffn: GroupMemory

    @property
    def num_micro_batches(self) -> int:
        """n."""
        return self.allocation.num_micro_batches(self.problem.job)

    @property
    def step_seconds(self) -> float:
        """The analytic step time."""
        return self.pipeline_seconds + self.synchronise_seconds

    @property
    def attention(self) -> GroupMemory:
        """The fuller of the two attention groups that may be fullest."""
        return max(self.attention_first, self.attention_tail, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """Whether everything fits: nodes and memory, at the closed form's live counts."""
        a_gpu, f_gpu = self.problem.attention_pool.gpu, self.problem.ffn_pool.gpu
        memory = self.attention.total <= a_gpu.memory_gb * 1e9 and self.ffn.total <= f_gpu.memory_gb * 1e9
        return bool(self.geometry.fits[0]) and memory

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the GPUs used could do in the step."""
        return self.mfu_at(self.step_seconds)

    def mfu_at(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step of ``seconds``."""
        p, a = self.problem, self.allocation
        flops = model_flops(p.model, sequence=p.job.sequence_length).total * p.job.tokens_per_step
        peak = a.attention_gpus * p.attention_pool.gpu.peak_flops + a.ffn_gpus * p.ffn_pool.gpu.peak_flops
        return flops / (seconds * peak)

    @property
    def placement(self) -> Placement:
        """Which group holds which stage."""
        return self.allocation.placement(self.problem.num_layers)

    @cached_property
    def costs(self) -> LayeredCosts:
        """For builders and the event engine, in seconds."""
        a, s = self.problem.attention, self.stages
        packing = float(self.links.packing[0])
        return LayeredCosts.of(
            forward=self._every_stage(a.forward, s.ffn, packing),
            backward=self._every_stage(a.backward, s.ffn_back, packing),
            weight=self._every_stage(a.weight, s.ffn_weight, 0.0),
            again=self.again_times,
            m2n=float(self.links.m2n[0]),
            n2m=float(self.links.n2m[0]),
            lane=float(self.links.lane[0]),
        )

    @property
    def tail_bytes(self) -> float:
        """What one micro-batch keeps in the tail. The tail's group has room for one in its workspace."""
        a, cut, r = self.problem.attention, int(self.candidate.cut[0]), int(self.candidate.recompute[0])
        return float(a.tail_kept[cut, r] + a.tail_workspace[cut])

    @property
    def again_times(self) -> tuple[float, ...]:
        """What of every stage is run again before its backward."""
        return self._every_stage(self.problem.attention.again, self._ffn_again(), 0.0)

    def _every_stage(self, attention: Floats, ffn: Floats, extra: float) -> tuple[float, ...]:
        """Of stages 0 .. 2L; ``extra`` on A(i), i < L."""
        times = np.full(2 * self.problem.num_layers + 1, float(ffn[0]))
        times[0::2] = attention[int(self.candidate.cut[0]), int(self.candidate.recompute[0])]
        times[0:-1:2] += extra
        return tuple(times.tolist())

    def _ffn_again(self) -> Floats:
        c, f = self.candidate, self.problem.ffn
        m = np.searchsorted(f.attention_ranks, c.attention_ranks)
        n = np.searchsorted(f.ffn_ranks, c.ffn_ranks)
        return f.again[c.ffn_lever, m, n, np.searchsorted(f.cuts, c.expert_tensor_parallel)]


def allocation_of(problem: Problem, candidates: Candidates, at: int) -> Allocation:
    """One candidate as an allocation."""
    c = candidates
    layout = LAYOUTS[int(c.layout[at])]
    a_pool, f_pool = problem.attention_pool, problem.ffn_pool
    a_nics, f_nics = float(a_pool.nics_per_node), float(f_pool.nics_per_node)
    tp, cp = problem.attention.cuts[int(c.cut[at])]
    recompute_ffn, redispatch = FFN_LEVERS[int(c.ffn_lever[at])]
    allocation = Allocation(
        attention_groups=int(c.attention_groups[at]),
        ffn_groups=int(c.ffn_groups[at]),
        attention_ranks=int(c.attention_ranks[at]),
        ffn_ranks=int(c.ffn_ranks[at]),
        replicas=int(c.replicas[at]),
        tensor_parallel=tp,
        context_parallel=cp,
        expert_tensor_parallel=int(c.expert_tensor_parallel[at]),
        attention_pool=problem.attention_pool_index,
        ffn_pool=problem.ffn_pool_index,
        nodes=layout,
        nic_split=int(c.nics[at]),
        schedule=SCHEDULE_KINDS[int(c.kind[at])],
        group_size=int(c.group_size[at]),
        recompute_attention=Recompute(int(c.recompute[at])),
        recompute_ffn=recompute_ffn,
        redispatch=redispatch,
        dispatch=DISPATCH_MODES[int(c.dispatch[at])],
        attention_nics_per_node=a_nics,
        ffn_nics_per_node=f_nics,
    )
    if layout is NodeLayout.SEPARATE or not a_pool.nics_per_node:
        return allocation
    split = problem.nics[allocation.nic_split]
    if split.attention:
        return replace(allocation, attention_nics_per_node=split.attention, ffn_nics_per_node=split.ffn)
    share = allocation.attention_gpus / allocation.num_gpus
    return replace(allocation, attention_nics_per_node=a_nics * share, ffn_nics_per_node=a_nics * (1 - share))


def candidate_of(problem: Problem, allocation: Allocation) -> Candidates:
    """An allocation as the one entry of candidates.

    Raises:
        ValueError: it uses what the problem's tables do not hold.
    """
    a = allocation
    cut = (a.tensor_parallel, a.context_parallel)
    for name, value, known in (
        ("tensor_parallel, context_parallel", cut, problem.attention.cuts),
        ("attention_ranks", a.attention_ranks, problem.ffn.attention_ranks.tolist()),
        ("ffn_ranks", a.ffn_ranks, problem.ffn.ffn_ranks.tolist()),
        ("expert_tensor_parallel", a.expert_tensor_parallel, problem.ffn.cuts.tolist()),
        ("nic_split", a.nic_split, range(len(problem.nics))),
    ):
        if value not in known:
            raise ValueError(f"{name} {value} is not possible here: choose from {list(known)}")
    for name, groups in (("attention_groups", a.attention_groups), ("ffn_groups", a.ffn_groups)):
        if not 1 <= groups <= problem.max_groups:
            raise ValueError(f"{name} {groups} is not possible here: choose between 1 and {problem.max_groups}")
    columns = (
        a.attention_groups,
        a.ffn_groups,
        a.attention_ranks,
        a.ffn_ranks,
        a.replicas,
        problem.attention.cuts.index(cut),
        a.expert_tensor_parallel,
        LAYOUTS.index(a.nodes),
        DISPATCH_MODES.index(a.dispatch),
        a.nic_split,
        int(a.recompute_attention),
        FFN_LEVERS.index((a.recompute_ffn, a.redispatch)),
        SCHEDULE_KINDS.index(a.schedule),
        a.group_size,
    )
    return Candidates(*(np.array([column], np.int64) for column in columns))


def evaluate(problem: Problem, allocation: Allocation) -> Evaluation:
    """Everything about ``allocation``, whether it fits or not.

    Raises:
        ValueError: sizes that the model, the batch or the cluster do not allow.
    """
    candidate = candidate_of(problem, allocation)
    geometry = geometry_of(problem, candidate, allocation.nodes)
    links = links_of(problem, candidate, geometry)
    stages = stages_of(problem, candidate, links)
    memory = memory_of(problem, candidate, links)
    n = num_micro_batches(problem, candidate)
    live = live_counts(problem, candidate)

    def counted(kind: str) -> int:
        if allocation.schedule == "sequential":
            groups = allocation.ffn_groups if kind == "ffn" else allocation.attention_groups
            return -(-problem.num_layers // groups)
        return int(getattr(live, kind).count(candidate.group_size, n)[0])

    evaluation = Evaluation(
        problem=problem,
        allocation=allocation,
        geometry=geometry,
        links=links,
        stages=stages,
        candidate=candidate,
        pipeline_seconds=float(pipeline_seconds(problem, candidate, links, stages)[0]),
        fill_bound=float(fill_bound(problem, candidate, links, stages)[0]),
        synchronise_seconds=float(synchronise_seconds(problem, candidate, links)[0]),
        attention_first=_group_memory(problem, memory, "first", counted("first")),
        attention_tail=_group_memory(problem, memory, "tail", counted("tail")),
        ffn=_group_memory(problem, memory, "ffn", counted("ffn")),
    )
    if allocation.place_layers == IN_TURN:
        return evaluation
    from megatron_disagmoe.planner.placing import evaluate_placed

    in_turn = replace(evaluation, allocation=replace(allocation, place_layers=IN_TURN))
    return evaluate_placed(in_turn, allocation)


def _group_memory(problem: Problem, memory: Memory, kind: str, live: int) -> GroupMemory:
    side: SideMemory = getattr(memory, kind)
    gpu = problem.ffn_pool.gpu if kind == "ffn" else problem.attention_pool.gpu
    kept = float(side.kept[0])
    return GroupMemory(
        parameters_and_gradients=float(side.fixed.parameters[0]),
        optimizer=float(side.fixed.optimizer[0]),
        activations=live * kept,
        workspace=float(side.fixed.workspace[0]),
        transport=float(side.fixed.transport[0]),
        reserved=gpu.reserved_memory_gb * 1e9,
        kept_per_live=kept,
        live=live,
    )
