"""From the files of all ranks to one trace: clocks aligned, sends matched with receives, arrows between them."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_disagmoe.schedules.actions import Group, Side
from megatron_disagmoe.tracing.chrome import (
    CLOCK_RECORD,
    RANK_RECORD,
    RECEIVE,
    SEND,
    Event,
    SliceWriter,
    event_of,
    flow_text,
)
from megatron_disagmoe.tracing.recorder import FORMAT_VERSION, PART_SUFFIX, finish_part, rank_metadata


@dataclass(frozen=True)
class RankTrace:
    """What one rank did, in order of start."""

    rank: int
    group: Group
    replica: int
    events: tuple[Event, ...]

    def of(self, category: str) -> list[Event]:
        """The events of one category."""
        return [event for event in self.events if event.category == category]


class Transfer(NamedTuple):
    """A message as both ends saw it."""

    sender: int
    receiver: int
    send: Event
    receive: Event

    @property
    def start(self) -> int:
        """When it can have begun at the earliest: both ends had posted it."""
        return max(self.send.start, self.receive.start)

    @property
    def end(self) -> int:
        """When it was over at the latest: one end had seen it complete. Never before ``start``."""
        end = self.receive.end if self.send.end == self.send.start else min(self.send.end, self.receive.end)
        return max(self.start, end)


def load_traces(directory: str | Path) -> tuple[RankTrace, ...]:
    """Every rank's trace in ``directory``, on one clock that is 0 at the first event, in order of rank.

    Raises:
        FileNotFoundError: for a directory without traces.
        ValueError: for a file that is not a trace of ours.
    """
    directory = Path(directory)
    for part in sorted(directory.glob(f"rank-*{PART_SUFFIX}")):
        finish_part(part)
    paths = sorted(directory.glob("rank-*.json"))
    if not paths:
        raise FileNotFoundError(f"no rank-*.json in {directory}: is it the folder given to --af-trace-dir?")
    ranks = sorted((_load(path) for path in paths), key=lambda trace: trace.rank)
    origin = min((trace.events[0].start for trace in ranks if trace.events), default=0)
    return tuple(
        RankTrace(
            trace.rank,
            trace.group,
            trace.replica,
            tuple(event._replace(start=event.start - origin, end=event.end - origin) for event in trace.events),
        )
        for trace in ranks
    )


def _load(path: Path) -> RankTrace:
    """One file, on the reference's clock."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"), parse_float=str)
        about = next(record["args"] for record in records if record["name"] == RANK_RECORD)
        if int(about["version"]) != FORMAT_VERSION:
            raise ValueError(f"{path} has format {about['version']}; this program reads {FORMAT_VERSION}")
        readings = sorted(
            (record["args"]["at_ns"], record["args"]["offset_ns"])
            for record in records
            if record["name"] == CLOCK_RECORD
        )
        events = [event_of(record) for record in records if record["ph"] == "X"]
    except (json.JSONDecodeError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{path} is not the trace of a rank: {error!r}") from error
    group = about["group"]
    aligned = [
        event._replace(start=on_reference(readings, event.start), end=on_reference(readings, event.end))
        for event in events
    ]
    aligned.sort(key=lambda event: (event.start, event.end))
    return RankTrace(about["rank"], Group(Side(group[0]), int(group[1:])), about["replica"], tuple(aligned))


def on_reference(readings: Sequence[tuple[int, int]], at: int) -> int:
    """The reference's clock when this rank's showed ``at``.

    ``readings`` are (time, offset) in order; between two of them the offset changes evenly, before the first and
    after the last it stays. No reading means that the clocks are one.
    """
    if not readings:
        return at
    index = bisect.bisect_right(readings, at, key=lambda reading: reading[0])
    if index == 0:
        return at + readings[0][1]
    if index == len(readings):
        return at + readings[-1][1]
    (before, low), (after, high) = readings[index - 1], readings[index]
    return at + low + (high - low) * (at - before) // (after - before)


def match_transfers(ranks: Sequence[RankTrace]) -> tuple[list[Transfer], int]:
    """Every message with both its ends, in order of start, and how many ends have no other.

    Messages of one edge, layer and micro-batch between two ranks come once a step and in order, so the k-th send
    belongs to the k-th receive.
    """
    sends: dict[tuple, list[Event]] = {}
    receives: dict[tuple, list[Event]] = {}
    for trace in ranks:
        for event in trace.events:
            if event.category == SEND:
                key = (trace.rank, event.peer, event.name, event.layer, event.micro_batch)
                sends.setdefault(key, []).append(event)
            elif event.category == RECEIVE:
                key = (event.peer, trace.rank, event.name, event.layer, event.micro_batch)
                receives.setdefault(key, []).append(event)
    transfers = [
        Transfer(key[0], key[1], send, receive)
        for key, sent in sends.items()
        for send, receive in zip(sent, receives.get(key, ()), strict=False)
    ]
    transfers.sort(key=lambda transfer: transfer.start)
    ends = sum(map(len, sends.values())) + sum(map(len, receives.values()))
    return transfers, ends - 2 * len(transfers)


def write_merged(ranks: Sequence[RankTrace], transfers: Sequence[Transfer], path: str | Path) -> None:
    """Write one Chrome trace of all ranks, with an arrow for every transfer."""
    with Path(path).open("w", encoding="utf-8") as target:
        target.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        for number, line in enumerate(_lines(ranks, transfers)):
            target.write(f",\n{line}" if number else line)
        target.write("\n]}\n")


def _lines(ranks: Sequence[RankTrace], transfers: Sequence[Transfer]) -> Iterator[str]:
    threads: dict[tuple[int, Event], int] = {}
    ends = {(t.sender, t.send): t.end for t in transfers}
    for trace in ranks:
        writer = SliceWriter(trace.rank, trace.group.side.value)
        yield from rank_metadata(trace.rank, str(trace.group), trace.replica)
        for event in trace.events:
            unseen = event.category == SEND and event.end == event.start
            end = ends.get((trace.rank, event), event.end) if unseen else event.end
            line, thread = writer.line(event._replace(end=end))
            yield line
            if event.category in (SEND, RECEIVE):
                threads[trace.rank, event] = thread
        yield from writer.threads()
    for number, (sender, receiver, send, receive) in enumerate(transfers):
        # an end must lie inside its slice; the last nanosecond is the nearest to its right edge that does
        last = max(receive.start, receive.end - 1)
        yield flow_text(number, send.name, starts=True, rank=sender, thread=threads[sender, send], at=send.start)
        yield flow_text(number, send.name, starts=False, rank=receiver, thread=threads[receiver, receive], at=last)
