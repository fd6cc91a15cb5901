"""What an allocation costs: stage costs for the event engine, memory by what it is, bounds, utilisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_disagmoe.planner.allocation import Allocation
from megatron_disagmoe.planner.arrays import Floats
from megatron_disagmoe.planner.layered_costs import LayeredCosts
from megatron_disagmoe.planner.layout import Geometry
from megatron_disagmoe.planner.links import Links
from megatron_disagmoe.planner.objective import Stages
from megatron_disagmoe.planner.operations import model_flops
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import Candidates
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
