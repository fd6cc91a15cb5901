"""Dispatching tokens a second time: FFN groups drop a stage's input after forward and get it again before backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_disagmoe.schedules.actions import Action, Group, Kind, Schedule, Side
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate, simulate_orders
from megatron_disagmoe.simulator.timeline import Timeline

#: How many dispatches before its backward a stage's tokens leave again, beside what their group may be busy with then;
#: the best is taken.
_LEADS = (1.0, 2.0, 4.0)


def redispatching(schedule: Schedule, costs: StageCosts) -> Schedule:
    """``schedule`` (compute actions only) with a ``D`` for every FFN stage and micro-batch.

    A ``D`` stands where its group is, in a simulated run, when the tokens have to leave. So everything can happen in
    the order of these times, and nothing waits in a circle.
    """
    if schedule.forward_only:
        return schedule
    timeline = simulate(schedule, costs)
    spans = [span for group, each in timeline.compute.items() if group.side is Side.A for span in each]
    busy = max(span.end - span.start for span in spans)
    tried = [_with_lead(schedule, timeline, busy + lead * costs.transfer) for lead in _LEADS]
    return min(tried, key=lambda each: simulate_orders(Orders.of(each), costs).makespan)


def _with_lead(schedule: Schedule, timeline: Timeline, lead: float) -> Schedule:
    backward: dict[tuple[int, int], float] = {
        (span.action.layer, span.action.micro_batch): span.start
        for group, spans in timeline.compute.items()
        if group.side is Side.F
        for span in spans
        if span.action.kind in (Kind.B, Kind.I)
    }
    actions: dict[Group, tuple[Action, ...]] = {}
    for group, spans in timeline.compute.items():
        timed = [(span.start, number, span.action) for number, span in enumerate(spans)]
        if group.side is Side.A:
            timed += _repeats(schedule, timeline, group, backward, lead)
        actions[group] = tuple(action for *_, action in sorted(timed, key=lambda item: item[:2]))
    return dataclasses.replace(schedule, actions=actions)


def _repeats(
    schedule: Schedule, timeline: Timeline, group: Group, backward: dict[tuple[int, int], float], lead: float
) -> Iterator[tuple[float, int, Action]]:
    """Every ``D`` of an attention group with when it happens: not before the stage's own forward has ended."""
    for span in timeline.compute[group]:
        kind, layer, micro_batch = span.action[:3]
        if kind is Kind.F and layer < schedule.placement.num_layers:
            leaves = max(span.end, backward[layer, micro_batch] - lead)
            yield leaves, -1, Action(Kind.D, layer, micro_batch)
