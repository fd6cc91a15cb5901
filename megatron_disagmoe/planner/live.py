"""How many micro-batch-layers a group holds live under interleaved 1F1B, in closed form.

With q = lcm(pA, pF) virtual groups a side, v layers on one of them and micro-batch groups of G, a worker runs
(v - 1) G + 2 (stages after it, there and back) + 1 forwards before its first backward, and holds as many from then on
(at L = v q and G = 4 q that makes 4 L - 1 on A_0). A real group holds q / p virtual ones. ``schedules.liveness`` counts
the same in the schedule itself, which is what a plan's memory is checked with in the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.planner.arrays import Floats, Ints
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import Candidates


@dataclass(frozen=True)
class Live:
    """Live count = min(``base`` + ``per_group_size`` G, ``most`` n)."""

    base: Ints
    per_group_size: Ints
    most: Ints

    def count(self, group_size: Ints, n: Ints) -> Ints:
        """Micro-batch-layers alive at most."""
        return np.minimum(self.base + self.per_group_size * group_size, self.most * n)


@dataclass(frozen=True)
class LiveCounts:
    """Of attention group 0, the tail's group, FFN group 0."""

    first: Live
    tail: Live
    ffn: Live


def live_counts(problem: Problem, candidates: Candidates) -> LiveCounts:
    """Of each candidate."""
    layers, c = problem.num_layers, candidates
    ring = np.lcm(c.attention_groups, c.ffn_groups)
    zero = np.zeros_like(ring)
    return LiveCounts(
        first=live_of_group(layers, c.attention_groups, ring, zero, side=0),
        tail=live_of_group(layers, c.attention_groups, ring, layers % c.attention_groups, side=0),
        ffn=live_of_group(layers, c.ffn_groups, ring, zero, side=1),
    )


def live_of_group(layers: int, groups: Ints, ring: Ints, group: Ints, *, side: int) -> Live:
    """Of ``group`` of one side (0 attention, 1 FFN), which holds virtual groups u = group + j groups < ring."""
    count = ring // groups
    each, rest = layers // ring, layers % ring
    deeper = np.clip(-(-(rest - group) // groups), 0, count)  # virtual groups with one layer more
    more = count * (each - 1) + deeper  # sum of v - 1
    positions = count * group + groups * count * (count - 1) // 2  # sum of u
    after = count * (4 * layers - 1 - 2 * side) - 4 * positions - 4 * ring * more
    return Live(base=after, per_group_size=more, most=count * each + deeper)


def peak(problem: Problem, candidates: Candidates, n: Ints) -> Floats:
    """[2, candidate] live on the fullest group of either side at the candidates' own G."""
    live = live_counts(problem, candidates)
    g = candidates.group_size
    return np.array([np.maximum(live.first.count(g, n), live.tail.count(g, n)), live.ffn.count(g, n)], np.float64)
