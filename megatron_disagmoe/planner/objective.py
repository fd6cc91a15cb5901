"""The analytic step time: the fill bound of the pipeline, what too small groups of micro-batches cost, and the rest.

Legend: a, f forward seconds of a stage, t1, t2, l of M2N, N2M and lane, n micro-batches, H_g when group g gets its
first work, Z_g the least time from its last backward to the end; both follow the path of one micro-batch.

Fill bound: the largest, over compute, sending and receiving port of every group, of (earliest first work) + (all work)
+ (least time from the last work to the end). It equals ``simulator.bounds`` for stages placed round-robin, computed
here for many candidates at once.

Too small groups: while a pipeline fills (and again while it drains) a worker runs G micro-batches on one stage, then
needs the first of them back from its trip round the ring of q groups a side. It waits (trip - G x slot) each of
L / q - 1 times, where slot is what the slower side computes for one. G = trip / slot costs nothing: 4 q where all
times are equal. Still smaller groups leave too few micro-batches alive to keep everybody busy (``residence_bound``).
Where that waiting would be long, other orders than groups are better: at equal depths builders come within ``TIGHT`` of
what work and live counts ask for (docs/builders.md has the figures).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from megatron_disagmoe.planner.allocation import SCHEDULE_KINDS
from megatron_disagmoe.planner.arrays import Bools, Floats, Ints
from megatron_disagmoe.planner.links import Links
from megatron_disagmoe.planner.live import Live, live_counts
from megatron_disagmoe.planner.memory import Memory, SideMemory, num_micro_batches
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import FFN_LEVERS, Candidates

INTERLEAVED, SPLIT, SEQUENTIAL = (
    SCHEDULE_KINDS.index(kind) for kind in ("interleaved-1f1b", "split-backward", "sequential")
)
#: Orders under a cap over the larger of fill and residence bound, at most, where both sides have equally many groups.
TIGHT = 1.15
_REDISPATCH = np.array([again for _, again in FFN_LEVERS])


@dataclass(frozen=True)
class Stages:
    """Seconds of each candidate's stages, packing included; attention's are means over the MoE layers."""

    ffn: Floats
    ffn_back: Floats
    ffn_weight: Floats
    attention_layer: Floats
    attention_layer_back: Floats

    def take(self, which: Bools) -> Self:
        """Some of them."""
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))


def stages_of(problem: Problem, candidates: Candidates, links: Links) -> Stages:
    """Look the stages up."""
    c, a, f = candidates, problem.attention, problem.ffn
    m = np.searchsorted(f.attention_ranks, c.attention_ranks)
    n = np.searchsorted(f.ffn_ranks, c.ffn_ranks)
    e = np.searchsorted(f.cuts, c.expert_tensor_parallel)
    layers = problem.num_layers
    mean, mean_back = a.forward_before[..., layers] / layers, a.backward_before[..., layers] / layers
    return Stages(
        ffn=f.forward[c.ffn_lever, m, n, e],
        ffn_back=f.backward[c.ffn_lever, m, n, e],
        ffn_weight=f.weight[c.ffn_lever, m, n, e],
        attention_layer=mean[c.cut, c.recompute] + links.packing,
        attention_layer_back=mean_back[c.cut, c.recompute] + links.packing,
    )


class Paths:
    """Start and end of the path of one micro-batch at a layer: H, Z and the attention stage there."""

    def __init__(self, problem: Problem, candidates: Candidates, links: Links, stages: Stages, *, split: Bools) -> None:
        self.tables, self.key = problem.attention, (candidates.cut, candidates.recompute)
        self.packing = links.packing
        transfers = links.m2n + links.n2m
        self.hop = links.packing + transfers + stages.ffn
        self.ffn_inputs = stages.ffn_back - np.where(split, stages.ffn_weight, 0.0)
        self.hop_back = links.packing + transfers + self.ffn_inputs
        self.split = split
        self.last_weight = np.where(split, self.tables.weight[(*self.key, 0)], 0.0)

    def start(self, layer: Ints) -> Floats:
        """H: earliest start of A(layer)."""
        return self.tables.forward_before[(*self.key, layer)] + layer * self.hop

    def forward(self, layer: Ints) -> Floats:
        """A(layer), layer < L."""
        return self.tables.forward[(*self.key, layer)] + self.packing

    def after(self, layer: Ints) -> Floats:
        """Z: from the end of A(layer)'s (input) gradients to the end of the step."""
        whole, inputs = self.tables.backward_before, self.tables.inputs_before
        summed = np.where(self.split, inputs[(*self.key, layer)], whole[(*self.key, layer)])
        return summed + layer * self.hop_back + self.last_weight

    def backward(self, layer: Ints) -> Floats:
        """(Input) gradients of A(layer), layer < L."""
        back, weight = self.tables.backward[(*self.key, layer)], self.tables.weight[(*self.key, layer)]
        return back - np.where(self.split, weight, 0.0) + self.packing


def fill_bound(problem: Problem, candidates: Candidates, links: Links, stages: Stages) -> Floats:
    """Seconds, by ``kind``; what the sequential order takes is ``sequential_seconds``."""
    c, layers = candidates, problem.num_layers
    n = num_micro_batches(problem, c).astype(np.float64)
    split = c.kind == SPLIT
    paths = Paths(problem, c, links, stages, split=split)
    bound = _attention_compute(problem, c, paths, n)
    for group in _last_groups(layers, c.ffn_groups):
        bound = np.maximum(bound, _ffn_compute(problem, c, paths, links, stages, group, n))
        bound = np.maximum(bound, _ffn_ports(problem, c, paths, links, stages, group, n))
    zero = np.zeros_like(c.attention_groups)
    for group in (zero, layers % c.attention_groups, *_last_groups(layers, c.attention_groups)):
        bound = np.maximum(bound, _attention_ports(problem, c, paths, links, group, n))
    return bound


def _last_groups(layers: int, groups: Ints) -> tuple[Ints, Ints]:
    """The last group with the most layers, and the last of all."""
    rest = layers % groups
    return np.where(rest > 0, rest, groups) - 1, groups - 1


def _attention_compute(problem: Problem, c: Candidates, paths: Paths, n: Floats) -> Floats:
    tables, depths, depth = problem.attention, problem.attention.depths, c.attention_groups - 1
    best = np.zeros(len(c))
    for k in range(depths.busiest.shape[1]):
        group, count = depths.busiest[depth, k], depths.layers[depth, k]
        work = tables.group_work[c.cut, c.recompute, depth, k] + 2 * count * paths.packing
        after = np.where(paths.split, 0.0, paths.after(group))
        best = np.maximum(best, paths.start(group) + n * work + after)
    return best


def _ffn_compute(
    problem: Problem, c: Candidates, paths: Paths, links: Links, stages: Stages, group: Ints, n: Floats
) -> Floats:
    count = (problem.num_layers - 1 - group) // c.ffn_groups + 1
    after = np.where(paths.split, 0.0, links.m2n + paths.backward(group) + paths.after(group))
    first = paths.start(group) + paths.forward(group) + links.m2n
    return first + n * count * (stages.ffn + stages.ffn_back) + after


def _ffn_ports(
    problem: Problem, c: Candidates, paths: Paths, links: Links, stages: Stages, group: Ints, n: Floats
) -> Floats:
    """The later of sending and receiving port; a repeated dispatch comes in a third time."""
    count = (problem.num_layers - 1 - group) // c.ffn_groups + 1
    start = paths.start(group) + paths.forward(group)
    end = paths.backward(group) + paths.after(group)
    work = n * count * (links.m2n + links.n2m)
    sending = start + links.m2n + stages.ffn + work + end
    again = n * count * links.m2n * _REDISPATCH[c.ffn_lever]
    return np.maximum(sending, start + work + again + paths.ffn_inputs + links.m2n + end)


def _attention_ports(problem: Problem, c: Candidates, paths: Paths, links: Links, group: Ints, n: Floats) -> Floats:
    """The later of sending and receiving port of an attention group."""
    layers, groups = problem.num_layers, c.attention_groups
    count = (layers - 1 - group) // groups + 1
    before = count + (group == layers % groups) - (group == 0)  # stages with a layer before them
    again = _REDISPATCH[c.ffn_lever]
    work = n * (count * links.m2n + before * links.n2m + (count + before) * links.lane)
    lanes = links.lane > 0
    behind = np.where(group > 0, group, groups)  # the first of its stages that has a layer before it
    sent_last = np.where(lanes, paths.backward(behind - 1) + paths.after(behind - 1), paths.after(behind) - links.n2m)
    repeated = paths.ffn_inputs + links.m2n + paths.backward(group) + paths.after(group)
    sent_last = np.where(again, np.minimum(sent_last, repeated), sent_last)
    sending = paths.start(group) + paths.forward(group) + work + n * count * links.m2n * again + sent_last
    got_first = np.where(lanes, paths.start(behind - 1) + paths.forward(behind - 1), paths.start(behind) - links.n2m)
    return np.maximum(sending, got_first + work + paths.backward(group) + paths.after(group))


def sequential_seconds(problem: Problem, candidates: Candidates, links: Links, stages: Stages) -> Floats:
    """One micro-batch after the other."""
    c, layers, a = candidates, problem.num_layers, problem.attention
    n = num_micro_batches(problem, c)
    both = a.forward_before[..., -1] + a.backward_before[..., -1]
    hop = 2 * (links.packing + links.m2n + links.n2m) + stages.ffn + stages.ffn_back
    return n * (both[c.cut, c.recompute] + layers * hop)


def sequential_fits(problem: Problem, candidates: Candidates, memory: Memory) -> Bools:
    """Whether one micro-batch at a time fits: every group holds each of its layers once."""
    layers, c = problem.num_layers, candidates
    tail = (layers - 1 - layers % c.attention_groups) // c.attention_groups + 1
    a_usable, f_usable = problem.attention_pool.gpu.usable_bytes, problem.ffn_pool.gpu.usable_bytes

    def fits(side: SideMemory, live: Ints, usable: float) -> Bools:
        return side.fixed.total + side.kept * live <= usable

    return (
        fits(memory.first, -(-layers // c.attention_groups), a_usable)
        & fits(memory.tail, tail, a_usable)
        & fits(memory.ffn, -(-layers // c.ffn_groups), f_usable)
    )


@dataclass(frozen=True)
class Trip:
    """Seconds of one micro-batch's way round the ring, and of the slower side's compute for one; both directions."""

    forward: Floats
    forward_slot: Floats
    backward: Floats
    backward_slot: Floats


def trip_of(candidates: Candidates, links: Links, stages: Stages) -> Trip:
    """Trip and slot on the q = lcm(pA, pF) virtual groups of a side."""
    c = candidates
    ring = np.lcm(c.attention_groups, c.ffn_groups).astype(np.float64)
    per_a, per_f = ring / c.attention_groups, ring / c.ffn_groups
    transfers = links.m2n + links.n2m
    back = np.where(c.kind == SPLIT, stages.ffn_back - stages.ffn_weight, stages.ffn_back)
    return Trip(
        forward=ring * (stages.attention_layer + stages.ffn + transfers),
        forward_slot=np.maximum(per_a * stages.attention_layer, per_f * stages.ffn),
        backward=ring * (stages.attention_layer_back + back + transfers),
        backward_slot=np.maximum(per_a * stages.attention_layer_back, per_f * back),
    )


def enough_group_size(trip: Trip) -> Ints:
    """The least G that costs nothing."""
    ratio = np.maximum(trip.forward / trip.forward_slot, trip.backward / trip.backward_slot)
    return np.ceil(ratio - 1e-9).astype(np.int64)


def best_group_size(enough: Ints, largest: Ints, n: Ints) -> Ints:
    """The least even G that costs nothing, else the largest that memory allows (``largest``, at least 1).

    Groups are made even: n micro-batches in j groups have G = ceil(n / j).
    """
    enough = np.clip(enough, 1, n)
    most_groups = np.where(enough > 1, -(-n // np.maximum(enough - 1, 1)) - 1, n)
    free = -(-n // np.maximum(most_groups, 1))
    allowed = -(-n // -(-n // np.minimum(largest, n)))
    return np.where(free <= largest, free, allowed)


def waiting_seconds(problem: Problem, candidates: Candidates, trip: Trip) -> Floats:
    """What groups smaller than a trip cost while the pipeline fills and drains."""
    c = candidates
    turns = np.maximum(problem.num_layers / np.lcm(c.attention_groups, c.ffn_groups) - 1, 0.0)
    short = np.maximum(trip.forward - c.group_size * trip.forward_slot, 0.0)
    return turns * (short + np.maximum(trip.backward - c.group_size * trip.backward_slot, 0.0))


def residence_bound(problem: Problem, candidates: Candidates, links: Links, stages: Stages) -> Floats:
    """What the live counts alone ask for: n x (time from forward to backward, summed over a group's layers) / live.

    A group's live count over time sums up to at least that time for every micro-batch, so it takes at least that long.
    Attention stages count as equally long here.
    """
    c, layers, a = candidates, problem.num_layers, problem.attention
    n = num_micro_batches(problem, c)
    hop = links.packing * 2 + 2 * (links.m2n + links.n2m) + stages.ffn + stages.ffn_back
    both = a.forward_before[..., -1] + a.backward_before[..., -1]
    whole = both[c.cut, c.recompute] + layers * hop
    attention = stages.attention_layer + stages.attention_layer_back
    layer = hop + attention - 2 * links.packing
    live = live_counts(problem, c)

    def bound(groups: Ints, counts: Live, outside: Floats) -> Floats:
        held = -(-layers // groups)
        inside = held * (whole - outside) - layer * groups * held * (held - 1) / 2
        return n * inside / np.maximum(counts.count(c.group_size, n), 1)

    at_a = bound(c.attention_groups, live.first, np.zeros(len(c)))
    at_f = bound(c.ffn_groups, live.ffn, attention + 2 * links.m2n)
    return np.maximum(at_a, np.where(_REDISPATCH[c.ffn_lever], 0.0, at_f))


def pipeline_seconds(problem: Problem, candidates: Candidates, links: Links, stages: Stages) -> Floats:
    """The analytic time of the pipeline at the candidates' own G and kind."""
    trip = trip_of(candidates, links, stages)
    filled, resident = (bound(problem, candidates, links, stages) for bound in (fill_bound, residence_bound))
    most = np.where(candidates.attention_groups == candidates.ffn_groups, TIGHT * np.maximum(filled, resident), np.inf)
    filled = np.minimum(np.maximum(filled + waiting_seconds(problem, candidates, trip), resident), most)
    one_by_one = candidates.kind == SEQUENTIAL
    if not one_by_one.any():
        return filled
    return np.where(one_by_one, sequential_seconds(problem, candidates, links, stages), filled)
