"""What the event engine says a measured step should take, with the stage times and bytes of that very run."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_disagmoe.benchmarks.shaped.cases import Model, Variant
from megatron_disagmoe.benchmarks.shaped.fleet import StepTaken
from megatron_disagmoe.benchmarks.shaped.raw_link import LinkSpeed
from megatron_disagmoe.schedule_choice import ScheduleChoice, step_schedule
from megatron_disagmoe.schedules.actions import Placement, Side
from megatron_disagmoe.schedules.orders import KINDS, Orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate_orders
from megatron_disagmoe.tracing.chrome import COMPUTE, SEND, WAIT, Event
from megatron_disagmoe.tracing.merge import RankTrace, load_traces, match_transfers
from megatron_disagmoe.tracing.predicted import fit_costs
from megatron_disagmoe.tracing.report import NANO, Step, events_in, find_steps


class Predictor:
    """Simulates the steps of one AF-pipe run from its traces.

    Stage times are those of the very step: of every action what its slowest rank took, with what the executor did
    between its messages and it. What the executor does between an action and the next one's first wait holds up the
    rank, not the messages. A transfer holds its ports for what its bytes take on the link (headers and TCP's share of
    the interface's count included, at the rate that plain sockets reach there: ``raw_link``) and arrives later by what
    a message takes where the link has no limit: copies, handshakes and wake-ups, which the link spares nobody. What a
    step does outside its stages (optimizer, gradient norm) is added as measured.
    """

    def __init__(self, traces: Path, variant: Variant, model: Model, hosts: int) -> None:
        assert variant.schedule is not None, "an AF-pipe variant names its schedule"
        self._ranks = load_traces(traces)
        self._steps = find_steps(self._ranks, skip=0)
        self._transfers, _ = match_transfers(self._ranks)
        placement = Placement.round_robin(num_layers=model.layers, num_attention_groups=1, num_ffn_groups=1)
        num_micro_batches = model.micro_batches // (hosts // 2)
        schedule = step_schedule(ScheduleChoice(variant.schedule), placement, num_micro_batches, forward_only=False)
        self._orders = Orders.of(schedule.schedule)
        self._ranks_a_side = hosts // 2
        # A nixl receiver knows of a message once UCX's acknowledgement has gone back and a note has come, both behind
        # whatever else crosses then; in turn nothing else does.
        self._waits_for_notes = variant.transport == "nixl" and variant.schedule != "sequential"

    def step_ms(
        self,
        link: float | None,
        numbers: Sequence[int],
        taken: Sequence[StepTaken],
        *,
        speed: LinkSpeed,
        unlimited: Sequence[int] = (),
    ) -> float:
        """Simulated time of a step at ``link`` Gbit/s.

        ``numbers`` says which steps of the run were taken there, ``unlimited`` which without a limit. ``speed``: what
        the link reaches. It is the median of those steps, each simulated with its own stage times.
        """
        steps = [self._steps[number] for number in numbers]
        costs = self.costs(numbers)
        latency = 0.0, 0.0
        if link is not None:
            a_byte = self._overhead(steps, taken) * 8e-9 / (link * speed.share)
            seconds = {edge: self._bytes(edge, steps) * a_byte for edge in ("M2N", "N2M")}
            if unlimited:
                least = self.costs(unlimited)
                notes = speed.round_trip if self._waits_for_notes else 0.0
                latency = least.transfer + notes, least.edge(1) + notes
            costs = dataclasses.replace(costs, transfer=seconds["M2N"], combine=seconds["N2M"])
        simulated = []
        for step, window in zip(taken, steps, strict=True):
            outside = step.seconds - max((end - start) / NANO for start, end in window.windows.values())
            compute, between = self._compute(window)
            run = simulate_orders(self._orders, costs, compute=compute, between=between, latency=latency)
            simulated.append(run.makespan + max(0.0, outside))
        return 1e3 * median(simulated)

    def costs(self, numbers: Sequence[int]) -> StageCosts:
        """Stage and transfer times of those steps, in seconds (``tracing.predicted.fit_costs``)."""
        steps = [self._steps[number] for number in numbers]
        return fit_costs(self._ranks, self._in_steps(steps), steps)

    def _compute(self, step: Step) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds of every compute action of the schedule, and after it, by the times of ``step``."""
        slowest: dict[tuple[str, int, int], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for trace in self._ranks:
            for action in busy_times(events_in(trace, step.windows[trace.rank])):
                event = action.event
                key = event.name, 2 * event.layer + (trace.group.side is Side.F), event.micro_batch
                slowest[key] = max(slowest[key][0], action.own / NANO), max(slowest[key][1], action.after / NANO)
        orders = self._orders
        actions = zip(orders.kind, orders.stage, orders.micro_batch, strict=True)
        found = [slowest[KINDS[kind].value, stage, micro_batch] for kind, stage, micro_batch in actions]
        own, after = np.array(found).T
        return own, after

    def _in_steps(self, steps: Sequence[Step]) -> list:
        windows = {rank: [step.windows[rank] for step in steps] for rank in steps[0].windows}
        return [
            transfer
            for transfer in self._transfers
            if any(start <= transfer.receive.end < end for start, end in windows[transfer.receiver])
        ]

    def _sent(self, trace: RankTrace, steps: Sequence[Step]) -> list:
        return [e for step in steps for e in events_in(trace, step.windows[trace.rank]) if e.category == SEND]

    def _bytes(self, edge: str, steps: Sequence[Step]) -> float:
        """Payload that one port carries for ``edge``: all messages of one rank, forward and gradient alike."""
        sizes = [e.num_bytes for t in self._ranks for e in self._sent(t, steps) if e.name.removeprefix("d") == edge]
        return median(sizes) * self._ranks_a_side

    def _overhead(self, steps: Sequence[Step], taken: Sequence[StepTaken]) -> float:
        """Bytes that the interfaces of the FFN hosts sent, over payload sent."""
        ffn = [trace for trace in self._ranks if trace.group.side is Side.F]
        payload = sum(event.num_bytes for trace in ffn for event in self._sent(trace, steps))
        return sum(step.bytes_sent[trace.rank] for step in taken for trace in ffn) / payload


class Busy(NamedTuple):
    """A compute action, in nanoseconds.

    ``own``: from its last wait's end until its message leaves (its end, where it sends none); ``after``: from then on
    until the rank waits for the next action's inputs.
    """

    event: Event
    own: int
    after: int


def busy_times(events: Iterable[Event]) -> list[Busy]:
    """A rank's compute actions in order."""
    found: list[Busy] = []
    made = 0  # when the message of the action before left
    waited: int | None = None
    last: Event | None = None
    for event in sorted((e for e in events if e.category in (COMPUTE, WAIT, SEND)), key=lambda each: each.start):
        if event.category == SEND:
            if last is not None and event.start < last.end:
                found[-1] = found[-1]._replace(own=found[-1].own - (made - event.start))
                made = event.start
            continue
        if found and waited is None:
            found[-1] = found[-1]._replace(after=event.start - made)
        if event.category == WAIT:
            waited = event.end
            continue
        found.append(Busy(event, event.end - (event.start if waited is None else waited), 0))
        last, made, waited = event, event.end, None
    return found
