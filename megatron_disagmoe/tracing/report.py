"""What merged traces say about a step: busy, waiting and exposed time of every rank.

A step is the time from its first rank's start to its last rank's end. In it a rank

- computes: the union of its compute spans;
- waits: the union of its waits, less what it computes meanwhile. A wait splits at the moment when the last
  of its senders posted the message: before it the rank waits for another *stage* (pipeline fill and drain,
  imbalance), after it for the *network*: that part is exposed communication;
- does something else: what is left (optimizer, bookkeeping, being early or late at the step's ends).

A rank's transfers are busy while a message it sends is on its way: from the moment when both ends had posted it
until either had seen it complete, which is the narrowest interval that can be known without a network's clock.

Over several steps each figure is the median of the steps.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from megatron_disagmoe.schedules.actions import Group
from megatron_disagmoe.tracing.chrome import COMPUTE, STEP, WAIT, Event
from megatron_disagmoe.tracing.merge import RankTrace, Transfer

Interval = tuple[int, int]
NANO = 1e9

#: The first step makes connections and buffers, so it is left out where there is another.
WARM_UP_STEPS = 1


@dataclass(frozen=True)
class Step:
    """One step of all ranks; times in nanoseconds."""

    iteration: int
    windows: dict[int, Interval]
    """When each rank began and ended it."""

    @property
    def start(self) -> int:
        """When its first rank began."""
        return min(start for start, _ in self.windows.values())

    @property
    def end(self) -> int:
        """When its last rank ended."""
        return max(end for _, end in self.windows.values())


@dataclass(frozen=True)
class RankFigures:
    """One rank in one step, or the medians over steps; seconds."""

    rank: int
    group: Group
    replica: int
    step: float
    compute: float
    transfer: float
    """Some message that it sends is on its way."""
    exposed: float
    """It stands still for the network."""
    stage_wait: float
    """It stands still for another stage."""

    @property
    def other(self) -> float:
        """Neither computing nor waiting."""
        return self.step - self.compute - self.exposed - self.stage_wait

    def as_json(self) -> dict[str, object]:
        """For ``disagmoe trace --json``."""
        return {
            "rank": self.rank,
            "group": str(self.group),
            "replica": self.replica,
            "step_s": self.step,
            "compute_s": self.compute,
            "transfer_s": self.transfer,
            "exposed_communication_s": self.exposed,
            "stage_wait_s": self.stage_wait,
            "other_s": self.other,
        }


def find_steps(ranks: Sequence[RankTrace], *, skip: int = WARM_UP_STEPS) -> list[Step]:
    """The steps that every rank finished, in order, without the first ``skip`` as long as one is left.

    Evaluation steps are left out where there are training steps.

    Raises:
        ValueError: where the ranks share no step, or ``skip`` is negative.
    """
    if skip < 0:
        raise ValueError(f"cannot leave out {skip} steps; use 0 or more")
    by_rank = {trace.rank: _windows(trace) for trace in ranks}
    shared = set.intersection(*(set(windows) for windows in by_rank.values())) if by_rank else set()
    if not shared:
        counts = ", ".join(f"rank {rank}: {len(windows)}" for rank, windows in by_rank.items())
        raise ValueError(f"no step was finished by every rank (steps per rank: {counts}); trace a longer run")
    steps = [Step(key[0], {rank: windows[key] for rank, windows in by_rank.items()}) for key in shared]
    steps.sort(key=lambda step: step.start)
    steps = [step for step in steps if _trains(ranks[0], step)] or steps
    return steps[min(skip, len(steps) - 1) :]


def _windows(trace: RankTrace) -> dict[tuple[int, int], Interval]:
    """When ``trace`` ran each step; evaluation repeats an iteration, so its occurrence is counted."""
    seen: Counter[int] = Counter()
    windows = {}
    for event in trace.of(STEP):
        windows[event.layer, seen[event.layer]] = (event.start, event.end)
        seen[event.layer] += 1
    return windows


def _trains(trace: RankTrace, step: Step) -> bool:
    return any(e.category == COMPUTE and e.name != "F" for e in events_in(trace, step.windows[trace.rank]))


def typical_step(steps: Sequence[Step]) -> Step:
    """The step of median length (of two, the shorter): the one to draw."""
    return sorted(steps, key=lambda step: step.end - step.start)[(len(steps) - 1) // 2]


def rank_figures(ranks: Sequence[RankTrace], transfers: Sequence[Transfer], steps: Sequence[Step]) -> list[RankFigures]:
    """Medians over ``steps`` for every rank."""
    splits = WaitSplits(transfers)
    on_way: dict[int, list[Interval]] = {trace.rank: [] for trace in ranks}
    for transfer in transfers:  # in order of start
        on_way[transfer.sender].append((transfer.start, transfer.end))
    return [_medians([_in_step(trace, on_way[trace.rank], splits, step) for step in steps]) for trace in ranks]


def events_in(trace: RankTrace, window: Interval) -> Sequence[Event]:
    """The events that began in ``window``."""
    first, last = (bisect.bisect_left(trace.events, at, key=lambda event: event.start) for at in window)
    return trace.events[first:last]


class WaitSplits:
    """When each wait turned from waiting for a stage into waiting for the network."""

    def __init__(self, transfers: Iterable[Transfer]) -> None:
        self._messages: dict[tuple, list[tuple[int, int]]] = {}  # (seen complete, posted by the sender), in order
        for transfer in transfers:
            receive = transfer.receive
            key = (transfer.receiver, receive.name, receive.layer, receive.micro_batch)
            self._messages.setdefault(key, []).append((receive.end, transfer.send.start))
        for messages in self._messages.values():
            messages.sort()

    def split(self, rank: int, wait: Event) -> int:
        """The moment inside ``wait`` from which on it is for the network: all of it where its messages are unknown."""
        messages = self._messages.get((rank, wait.name, wait.layer, wait.micro_batch), [])
        # it waits for what was seen complete during it, or else for what was next
        first = bisect.bisect_left(messages, wait.start, key=lambda message: message[0])
        after = bisect.bisect_right(messages, wait.end, key=lambda message: message[0])
        posted = max((sent for _, sent in messages[first : max(after, first + 1)]), default=wait.start)
        return min(max(posted, wait.start), wait.end)


def _in_step(trace: RankTrace, on_way: Sequence[Interval], splits: WaitSplits, step: Step) -> RankFigures:
    window = step.windows[trace.rank]
    computes, stage_waits, network_waits = [], [], []
    for event in events_in(trace, window):
        if event.category == COMPUTE:
            computes.append((event.start, event.end))
        elif event.category == WAIT:
            turn = splits.split(trace.rank, event)
            stage_waits.append((event.start, turn))
            network_waits.append((turn, event.end))
    first, last = (bisect.bisect_left(on_way, at, key=lambda interval: interval[0]) for at in window)
    # time counts once: first as compute, then as exposed, then as waiting for a stage
    working = covered(computes, window)
    communicating = covered(computes + network_waits, window)
    return RankFigures(
        rank=trace.rank,
        group=trace.group,
        replica=trace.replica,
        step=(step.end - step.start) / NANO,
        compute=working / NANO,
        transfer=covered(on_way[first:last], window) / NANO,
        exposed=(communicating - working) / NANO,
        stage_wait=(covered(computes + network_waits + stage_waits, window) - communicating) / NANO,
    )


def covered(intervals: Iterable[Interval], window: Interval) -> int:
    """How much of ``window`` lies in any of ``intervals``."""
    total, reached = 0, window[0]
    for start, end in sorted(intervals):
        start, end = max(start, reached), min(end, window[1])
        if start < end:
            total += end - start
            reached = end
    return total


def _medians(figures: Sequence[RankFigures]) -> RankFigures:
    first = figures[0]
    return RankFigures(
        rank=first.rank,
        group=first.group,
        replica=first.replica,
        step=median(f.step for f in figures),
        compute=median(f.compute for f in figures),
        transfer=median(f.transfer for f in figures),
        exposed=median(f.exposed for f in figures),
        stage_wait=median(f.stage_wait for f in figures),
    )
