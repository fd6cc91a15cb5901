"""Times of stages and transfers of one allocation and bounds on its pipeline, in plain Python: part of the oracle."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Literal

from megatron_disagmoe.planner.allocation import Allocation
from megatron_disagmoe.planner.attention_side import AttentionSide
from tests.planner.oracle_machines import Transfers

_Message = Literal["m2n", "n2m", "lane"]


@dataclass(frozen=True)
class Port:
    """One direction of a group's network: how many messages of a kind pass in both directions of the pipeline.

    ``first``: stages whose forward makes what passes first; ``last``: stages whose gradients are made after the last.
    """

    messages: tuple[tuple[_Message, int], ...]
    first: tuple[int, ...]
    last: tuple[int, ...]


@cache
def groups_of(layers: int, attention_groups: int, ffn_groups: int) -> tuple[tuple[int, ...], ...]:
    """The stages of every group: A(i) is stage 2 i, F(i) is 2 i + 1, the tail 2 L."""
    a = [tuple(range(2 * g, 2 * layers + 1, 2 * attention_groups)) for g in range(attention_groups)]
    f = [tuple(range(2 * g + 1, 2 * layers, 2 * ffn_groups)) for g in range(ffn_groups)]
    return (*a, *f)


@cache
def ports_of(layers: int, attention_groups: int, ffn_groups: int, *, lanes: bool, again: bool) -> tuple[Port, ...]:
    """Both ports of every group."""
    sides = (attention_groups, ffn_groups)
    messages: dict[tuple[str, int, int], Counter[_Message]] = {}
    first: dict[tuple[str, int, int], set[int]] = {}
    last: dict[tuple[str, int, int], set[int]] = {}

    def passes(sender: int, receiver: int, what: _Message, *, made: int | None = None, used: int | None = None) -> None:
        for direction, stage in (("out", sender), ("in", receiver)):
            port = (direction, stage % 2, stage // 2 % sides[stage % 2])
            messages.setdefault(port, Counter())[what] += 1
            first.setdefault(port, set()).update(() if made is None else (made,))
            last.setdefault(port, set()).update(() if used is None else (used,))

    for s in range(2 * layers):
        edges: list[tuple[int, _Message]] = [(s + 1, "n2m" if s % 2 else "m2n")]
        edges += [(s + 2, "lane")] if lanes and s % 2 == 0 else []
        for to, what in edges:
            passes(s, to, what, made=s)
            passes(to, s, what, used=s)
        if again and s % 2 == 0:
            passes(s, s + 1, "m2n", made=s, used=s + 1)
    return tuple(Port(tuple(messages[k].items()), tuple(first[k]), tuple(last[k])) for k in messages)


class Run:
    """Stage times of one allocation; ``live``: micro-batch-layers on group 0 of either side."""

    def __init__(
        self,
        layers: int,
        a: Allocation,
        side: AttentionSide,
        ffn: tuple[float, ...],
        transfers: Transfers,
        *,
        again: bool,
        split: bool,
    ) -> None:
        self.a, self.layers, self.again, self.split = a, layers, again, split
        self.m2n, self.n2m, self.lane, packing = transfers[:4]
        last = 2 * self.layers
        self.forward = [0.0] * (last + 1)
        self.back, self.weight = list(self.forward), list(self.forward)
        forward, back, weight = side.forward.tolist(), side.backward.tolist(), side.weight.tolist()
        for i in range(self.layers + 1):
            extra = packing if i < self.layers else 0.0
            self.forward[2 * i], self.back[2 * i], self.weight[2 * i] = forward[i] + extra, back[i] + extra, weight[i]
            if i < self.layers:
                self.forward[2 * i + 1], self.back[2 * i + 1], self.weight[2 * i + 1] = ffn[:3]
        self.inputs = [b - w if split else b for b, w in zip(self.back, self.weight, strict=True)]

    def edge(self, stage: int) -> float:
        """Of the transfer between a stage and the next."""
        return self.m2n if stage % 2 == 0 else self.n2m

    def whole_path(self) -> float:
        """One micro-batch alone."""
        return sum(self.forward) + sum(self.back) + 2 * self.layers * (self.m2n + self.n2m)

    def fill_bound(self, n: int) -> float:
        """Every resource: earliest first work, all work, least time after the last."""
        last = 2 * self.layers
        start, after = [0.0] * (last + 1), [0.0] * (last + 1)
        after[0] = self.weight[0] if self.split else 0.0
        for s in range(1, last + 1):
            start[s] = start[s - 1] + self.forward[s - 1] + self.edge(s - 1)
            after[s] = after[s - 1] + self.inputs[s - 1] + self.edge(s - 1)
        sizes = (self.layers, self.a.attention_groups, self.a.ffn_groups)
        bounds = []
        for stages in groups_of(*sizes):
            end = 0.0 if self.split else min(after[s] for s in stages)
            busy = sum(self.forward[s] + self.back[s] for s in stages)
            bounds.append(min(start[s] for s in stages) + n * busy + end)
        made = [begin + time for begin, time in zip(start, self.forward, strict=True)]
        used = [time + end for time, end in zip(self.inputs, after, strict=True)]
        seconds = {"m2n": self.m2n, "n2m": self.n2m, "lane": self.lane}
        for port in ports_of(*sizes, lanes=self.lane > 0, again=self.again):
            busy = sum(count * seconds[what] for what, count in port.messages)
            bounds.append(min(made[s] for s in port.first) + n * busy + min(used[s] for s in port.last))
        return max(bounds)

    def _mean_attention(self) -> tuple[float, float, float]:
        stages = range(0, 2 * self.layers, 2)
        count = self.layers
        mean = [sum(table[s] for s in stages) / count for table in (self.forward, self.back)]
        return mean[0], mean[1], self.forward[1]

    def waiting(self, g: int) -> float:
        """What groups smaller than a trip round the ring cost."""
        a = self.a
        q = math.lcm(a.attention_groups, a.ffn_groups)
        forward, back, ffn = self._mean_attention()
        ffn_back = self.inputs[1]
        per_a, per_f = q / a.attention_groups, q / a.ffn_groups
        edges = self.m2n + self.n2m
        there = q * (forward + ffn + edges) - g * max(per_a * forward, per_f * ffn)
        again = q * (back + ffn_back + edges) - g * max(per_a * back, per_f * ffn_back)
        return max(self.layers / q - 1, 0.0) * (max(there, 0.0) + max(again, 0.0))

    def residence(self, n: int, live: tuple[int, int]) -> float:
        """What the live counts of group 0 of either side ask for."""
        a = self.a
        forward, back, _ = self._mean_attention()
        edges = 2 * (self.m2n + self.n2m)
        layer = forward + back + edges + self.forward[1] + self.back[1]
        whole = sum(self.forward) + sum(self.back) + self.layers * edges

        def bound(p: int, side: int, outside: float) -> float:
            inside = sum(whole - outside - i * layer for i in range(0, self.layers, p))
            return n * inside / max(live[side], 1)

        at_f = 0.0 if self.again else bound(a.ffn_groups, 1, forward + back + 2 * self.m2n)
        return max(bound(a.attention_groups, 0, 0.0), at_f)
