"""What a schedule should have taken: simulated with given costs, and with the stage times that were measured.

The first says how good the cost model was, the second what the executor and the network lost against a perfect
run of the same stages.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from megatron_disagmoe.schedules import text
from megatron_disagmoe.schedules.actions import Edge, Kind, Schedule, Side
from megatron_disagmoe.schedules.dataflow import COMPUTE as COMPUTE_KINDS
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.tracing.chrome import COMPUTE, WAIT, Event
from megatron_disagmoe.tracing.merge import RankTrace, Transfer
from megatron_disagmoe.tracing.report import NANO, Step, events_in

SCHEDULE_FILE, COSTS_FILE = "schedule.txt", "costs.json"
"""What training leaves beside the ranks' traces: the schedule it ran, and the costs it was planned with."""

LEAST_AWAITED = 0.1
"""A message was awaited if its wait covers this much of its transfer; a shorter wait found it there already."""


def save_costs(costs: StageCosts, directory: str | Path) -> None:
    """Write ``costs``, in seconds, where ``disagmoe trace`` finds them."""
    path = Path(directory) / COSTS_FILE
    path.write_text(json.dumps(dataclasses.asdict(costs), indent=1) + "\n", encoding="utf-8")


def load_costs(directory: str | Path) -> StageCosts | None:
    """The costs in ``directory``, None where there are none.

    Raises:
        ValueError: for a file that does not hold stage costs.
    """
    path = Path(directory) / COSTS_FILE
    if not path.exists():
        return None
    try:
        return StageCosts(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the costs of stages: {error}") from error


def load_schedule(directory: str | Path) -> Schedule | None:
    """The schedule in ``directory``, None where there is none; errors as ``schedules.text.load``."""
    path = Path(directory) / SCHEDULE_FILE
    return text.load(path) if path.exists() else None


def describes(schedule: Schedule, ranks: Sequence[RankTrace], step: Step) -> bool:
    """Whether every rank ran exactly the compute actions that ``schedule`` has for its group, in that order."""
    for trace in ranks:
        ran = [
            (event.name, event.layer, event.micro_batch)
            for event in events_in(trace, step.windows[trace.rank])
            if event.category == COMPUTE and event.name != Kind.D.value
        ]
        planned = [
            (action.kind.value, action.layer, action.micro_batch)
            for action in schedule.actions.get(trace.group, ())
            if action.kind in COMPUTE_KINDS and action.kind is not Kind.D
        ]
        if ran != planned:
            return False
    return True


def fit_costs(ranks: Sequence[RankTrace], transfers: Sequence[Transfer], steps: Sequence[Step]) -> StageCosts:
    """Stage costs in seconds, fitted to what was measured in ``steps``.

    A forward time is the median over ranks, layers and micro-batches. ``backward_ratio`` and ``weight_fraction`` are
    those of the medians of every layer as well (a stage that was held up says nothing about its cost), less the
    forwards that FFN stages ran again because they were dispatched again: the simulator adds those itself. A transfer's
    time is the median over the messages that somebody stood waiting for, as only their ends are known to the moment;
    where nobody ever waited, the shortest.

    Raises:
        ValueError: where no attention or no FFN stage ran.
    """
    num_layers = 1 + max((e.layer for t in ranks if t.group.side is Side.F for e in t.of(COMPUTE)), default=-1)
    taken: dict[tuple[str, Side, int], list[float]] = {}
    repeated = {(t.receive.layer, t.receive.micro_batch) for t in transfers if t.receive.name == Edge.AGAIN.value}
    run_again: list[int] = []
    for trace in ranks:
        for step in steps:
            for event in events_in(trace, step.windows[trace.rank]):
                if event.category != COMPUTE or event.name not in ("F", "B", "I", "W"):
                    continue
                key = event.name, trace.group.side, event.layer
                taken.setdefault(key, []).append((event.end - event.start) / NANO)
                if key[:2] == ("F", Side.F) and (event.layer, event.micro_batch) in repeated:
                    run_again.append(event.layer)

    def middle(side: Side, layers: Iterable[int]) -> float:
        return median([took for layer in layers for took in taken.get(("F", side, layer), [])] or [0.0])

    def typical(name: str) -> float:
        return sum(len(times) * median(times) for (kind, *_), times in taken.items() if kind == name)

    ffn, first = middle(Side.F, range(num_layers)), middle(Side.A, [0])
    attention = middle(Side.A, range(1, num_layers)) or first
    if not (attention and ffn):
        raise ValueError("the traces hold no forward stage of one of the sides; their costs cannot be fitted")
    split, again = typical("I") + typical("W"), sum(median(taken["F", Side.F, layer]) for layer in run_again)
    times = _transfer_times(ranks, transfers)
    return StageCosts(
        attention=attention,
        ffn=ffn,
        tail=middle(Side.A, [num_layers]),
        embedding=max(0.0, first - attention),
        transfer=times.get(Edge.M2N, 0.0),
        combine=times.get(Edge.N2M, 0.0),
        lane=times.get(Edge.LANE, 0.0),
        backward_ratio=max(0.0, typical("B") + split - again) / typical("F"),
        weight_fraction=typical("W") / split if split else StageCosts.weight_fraction,
    )


def _transfer_times(ranks: Sequence[RankTrace], transfers: Sequence[Transfer]) -> dict[Edge, float]:
    """Seconds that a message takes on each kind of edge, either way."""
    waits: dict[tuple, list[Event]] = {}
    for trace in ranks:
        for wait in trace.of(WAIT):
            waits.setdefault((trace.rank, wait.name, wait.layer, wait.micro_batch), []).append(wait)
    exact: dict[Edge, list[float]] = {}
    loose: dict[Edge, list[float]] = {}
    for transfer in transfers:
        receive = transfer.receive
        edge = Edge(receive.name.removeprefix("d"))
        took = (transfer.end - transfer.start) / NANO
        loose.setdefault(edge, []).append(took)
        key = (transfer.receiver, receive.name, receive.layer, receive.micro_batch)
        same = waits.get(key, [])
        index = bisect.bisect_left(same, transfer.end, key=lambda wait: wait.end)
        if index < len(same) and transfer.end - same[index].start >= LEAST_AWAITED * (transfer.end - transfer.start):
            exact.setdefault(edge, []).append(took)
    return {edge: median(exact[edge]) if edge in exact else min(all_of_it) for edge, all_of_it in loose.items()}
