"""How near the builders come to the lower bounds, in the cases that they are to be good at, and how long they take.

Times are in those of a stage. Where p_A and p_F differ, costs are scaled so that every rank has the same load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_disagmoe import builders
from megatron_disagmoe.builders.placement import balanced_placement
from megatron_disagmoe.schedules.actions import Placement, Schedule
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.verifier import verify
from megatron_disagmoe.simulator.bounds import Workload, lower_bounds
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.feed_bound import feed_bound
from megatron_disagmoe.simulator.nested_bound import nested_bound
from megatron_disagmoe.simulator.simulate import simulate
from megatron_disagmoe.simulator.step_bound import step_bound

#: Caps of the frontier to measure, four groups a side, 32 layers, 64 micro-batches.
CAPS = (9, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 72, 73, 88, 96, 112, 128)


@dataclass(frozen=True)
class Case:
    """One schedule to build and what it is held against.

    ``bound``: ``fill``, ``nested`` (for few micro-batches) or ``cap``; the makespan may be ``bar`` times that.
    """

    part: str
    kind: str
    placement: Placement
    num_micro_batches: int
    costs: StageCosts
    bar: float
    bound: str = "fill"
    max_live: int | None = None
    max_seconds: float | None = None
    order_messages: bool = False


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _balanced()
    yield from _unbalanced()
    yield from _asymmetric()
    yield from _tails()
    yield from _few()
    costs = StageCosts(attention=1, ffn=1, transfer=0.5)
    for cap in CAPS:
        yield Case("frontier", "interleaved-1f1b", _ring(32, 4, 4), 64, costs, 1.05, "cap", cap)
    for cap in CAPS:
        args = ("interleaved-1f1b", _ring(32, 4, 4), 64, costs, 1.05, "cap", cap)
        yield Case("frontier in order", *args, order_messages=True)
    for layers, n, caps in ((4, 8, (3, 4, 5, 6, 8, 10, 12, 16)), (8, 16, (5, 7, 9, 12, 16, 20, 28))):
        for cap in caps:
            yield Case("small frontier", "interleaved-1f1b", _ring(layers, 2, 2), n, costs, 1.05, "cap", cap)
    for p in (32, 64):
        yield Case("large", "interleaved-1f1b", _ring(128, p, p), 256, costs, 1.005, max_seconds=2.0)
    for cap in (4, 20, 50, 100, 300):
        yield Case("large capped", "interleaved-1f1b", _ring(128, 64, 64), 256, costs, 1.05, "cap", cap, 2.0)


def named(parts: str | None) -> Iterator[Case]:
    """The cases of ``parts``, names with commas between; all where None.

    Raises:
        ValueError: where there is no such part.
    """
    known = list(dict.fromkeys(case.part for case in cases()))
    wanted = known if parts is None else [name.strip() for name in parts.split(",")]
    for name in wanted:
        if name not in known:
            raise ValueError(f"there is no part {name!r}; choose among {', '.join(known)}")
    return (case for case in cases() if case.part in wanted)


def _ring(num_layers: int, p: int, q: int) -> Placement:
    return Placement.round_robin(num_layers=num_layers, num_attention_groups=p, num_ffn_groups=q)


def _balanced() -> Iterator[Case]:
    for transfer in (0.5, 1.0):
        costs = StageCosts(attention=1, ffn=1, transfer=transfer)
        for p in (1, 2, 4):
            for v in (4, 8):
                for n in (16, 32, 64):
                    yield Case("balanced", "interleaved-1f1b", _ring(p * v, p, p), n, costs, 1.005)
        for layers in (30, 94):
            for n in (24, 40, 50):
                yield Case("ragged", "interleaved-1f1b", _ring(layers, 4, 4), n, costs, 1.005)
        yield Case("split", "split-backward", _ring(32, 4, 4), 32, costs, 1.005)


def _unbalanced() -> Iterator[Case]:
    for attention, ffn in ((1.0, 0.6), (0.6, 1.0)):
        costs = StageCosts(attention=attention, ffn=ffn, transfer=0.8)
        yield Case("unbalanced", "interleaved-1f1b", _ring(32, 4, 4), 32, costs, 1.005)
    costs = StageCosts(attention=1, ffn=1, transfer=1.5)
    for ordered in (False, True):
        yield Case("network-bound", "interleaved-1f1b", _ring(32, 4, 4), 64, costs, 1.045, order_messages=ordered)


def _asymmetric() -> Iterator[Case]:
    sizes = [(p, q, 32, 64) for p, q in ((1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1))]
    for p, q, layers, n in (*sizes, (2, 3, 24, 96), (3, 2, 24, 96)):
        load = max(p, q)
        for transfer in (0.5 * min(p, q) / load, 0.5):
            costs = StageCosts(attention=p / load, ffn=q / load, transfer=transfer)
            yield Case("asymmetric", "interleaved-1f1b", _ring(layers, p, q), n, costs, 1.01)


def _tails() -> Iterator[Case]:
    for tail in (0.1, 0.2, 0.3):
        for embedding in (0.0, 0.2):
            costs = StageCosts(attention=1, ffn=1, transfer=0.5, tail=tail, embedding=embedding)
            for layers in (30, 32):
                yield Case("tail", "interleaved-1f1b", _ring(layers, 4, 4), 32, costs, 1.005)
    costs = StageCosts(attention=1, ffn=1, transfer=0.5, tail=6)
    for p, n in ((2, 16), (4, 32)):
        yield Case("long tail", "interleaved-1f1b", balanced_placement(32, p, p, costs), n, costs, 1.08)


def _few() -> Iterator[Case]:
    costs = StageCosts(attention=1, ffn=1, transfer=0.5)
    for n in (1, 2, 4, 6, 8, 10, 12, 15):
        yield Case("few", "interleaved-1f1b", _ring(32, 4, 4), n, costs, 1.005, "nested")


def measure(chosen: Iterator[Case], progress: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Build every case; the first one twice, so that compiling does not count."""
    rows: list[dict[str, Any]] = []
    for case in chosen:
        if not rows:
            _build(case)
        begin = time.perf_counter()
        schedule = _build(case)
        seconds = time.perf_counter() - begin
        workload = Workload.of(schedule, case.costs)
        bounds = lower_bounds(workload, max_live=case.max_live)
        makespan = simulate(schedule, case.costs).makespan
        bound = {
            "fill": bounds.fill,
            "cap": step_bound(workload, max_live=case.max_live),
            "nested": max(bounds.fill, nested_bound(workload)),
        }[case.bound]
        placement = case.placement
        report = verify(schedule, max_live=case.max_live)
        rows.append(
            {
                "part": case.part,
                "kind": case.kind,
                "attention_groups": placement.num_attention_groups,
                "ffn_groups": placement.num_ffn_groups,
                "layers": placement.num_layers,
                "micro_batches": case.num_micro_batches,
                "attention": case.costs.attention,
                "ffn": case.costs.ffn,
                "transfer": case.costs.transfer,
                "tail": case.costs.tail,
                "embedding": case.costs.embedding,
                "max_live": case.max_live,
                "ports_in_order": schedule.ports_in_order,
                "live": max(peak_live(schedule).values()),
                "makespan": makespan,
                "over_busy": makespan / bounds.busy,
                "over_fill": makespan / bounds.fill,
                "over_phase": makespan / bounds.phase,
                "over_feed": makespan / max(bounds.fill, feed_bound(workload)),
                "bound": case.bound,
                "over_bound": makespan / bound,
                "bar": case.bar,
                "seconds": seconds,
                "safe": report.ok,
                "holds": report.ok
                and makespan <= case.bar * bound
                and (case.max_seconds is None or seconds <= case.max_seconds),
            }
        )
        progress(f"{case.part} {placement.num_attention_groups}+{placement.num_ffn_groups}: {makespan / bound:.4f}")
    return rows


def _build(case: Case) -> Schedule:
    return builders.build(
        case.kind,
        case.placement,
        num_micro_batches=case.num_micro_batches,
        costs=case.costs,
        max_live=case.max_live,
        order_messages=case.order_messages,
    )
