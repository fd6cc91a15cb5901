"""The Chrome trace format, which chrome://tracing and ui.perfetto.dev read.

"Trace Event Format", Google, 2016: complete events (``ph`` X), metadata (M), flows (s, f). One process per
rank; its threads are the rows below. Slices of one thread may not cross, and transfers do, so sends and
receives are spread over as many lanes as they need. Times are microseconds with three decimals.
"""

from __future__ import annotations

import json
from typing import NamedTuple

COMPUTE, WAIT, SEND, RECEIVE, STEP = "compute", "wait", "send", "receive", "step"

#: Thread of each category; lanes of sends and receives follow their first.
THREADS = {STEP: 0, COMPUTE: 1, WAIT: 2, SEND: 1000, RECEIVE: 2000}

RANK_RECORD, CLOCK_RECORD = "disagmoe_rank", "disagmoe_clock"
"""Names of our own metadata, which viewers ignore: who wrote the file, and a reading of its clock's offset."""


class Event(NamedTuple):
    """One thing that a rank did. Times in nanoseconds."""

    category: str
    """One of COMPUTE, WAIT, SEND, RECEIVE, STEP."""
    name: str
    """Kind of a compute action (``F``), edge of the others (``M2N``, gradients ``dM2N``), empty for a step."""
    layer: int
    """Layer of the stage or edge; the iteration of a step."""
    micro_batch: int
    peer: int
    """The other rank; -1 where there is none."""
    num_bytes: int
    start: int
    end: int


class Lanes:
    """Spreads overlapping slices over as few threads as they need: the first lane that is free takes the next."""

    def __init__(self, first_thread: int) -> None:
        self._first = first_thread
        self._busy_until: list[int] = []

    def thread_for(self, start: int, end: int) -> int:
        """Thread of a slice; slices that come late, before others already placed, get lanes of their own."""
        busy = self._busy_until
        for lane, until in enumerate(busy):
            if until <= start:
                busy[lane] = end
                return self._first + lane
        busy.append(end)
        return self._first + len(busy) - 1

    @property
    def count(self) -> int:
        """Lanes in use."""
        return len(self._busy_until)


PlainEvent = tuple[str, str, int, int, int, int, int, int]
"""The fields of an ``Event`` without its class, which costs time to make."""


class SliceWriter:
    """Makes the lines of one rank. What a line says is remembered, as it comes again every step."""

    def __init__(self, rank: int, side: str) -> None:
        self._rank = rank
        self._side = side
        self._heads: dict[tuple[str, str, int, int, int], str] = {}
        self._lanes = {SEND: Lanes(THREADS[SEND]), RECEIVE: Lanes(THREADS[RECEIVE])}

    def line(self, event: PlainEvent) -> tuple[str, int]:
        """One line of JSON for ``event``, and the thread it is on."""
        category, name, layer, micro_batch, peer, num_bytes, start, end = event
        key = (category, name, layer, micro_batch, peer)
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = self._head(*key)
        lanes = self._lanes.get(category)
        if lanes is None:
            thread, size = THREADS[category], ""
        else:
            thread, size = lanes.thread_for(start, end), f',"bytes":{num_bytes}'
        # a clock reading split by hand: as a float it would lose nanoseconds after the machine's 104th day
        whole, rest = divmod(start, 1000)
        duration, part = divmod(end - start, 1000)
        return f'{head}{size}}},"tid":{thread},"ts":{whole}.{rest:03d},"dur":{duration}.{part:03d}}}', thread

    def _head(self, category: str, name: str, layer: int, micro_batch: int, peer: int) -> str:
        if category == COMPUTE:
            title = f"{name} {self._side}({layer}) m{micro_batch}"
            about = f'"kind":"{name}","stage":"{self._side}({layer})","layer":{layer},"micro_batch":{micro_batch}'
        elif category == STEP:
            title, about = f"step {layer}", f'"iteration":{layer}'
        else:
            title = f"{name}({layer}) m{micro_batch} {'to' if category == SEND else 'from'} {peer}"
            about = f'"edge":"{name}","layer":{layer},"micro_batch":{micro_batch},"peer":{peer}'
        return f'{{"name":"{title}","cat":"{category}","ph":"X","pid":{self._rank},"args":{{{about}'

    def threads(self) -> list[str]:
        """How viewers name and order the rank's rows."""
        lines = []
        for category, first in THREADS.items():
            lanes = self._lanes.get(category)
            for thread in range(first, first + (1 if lanes is None else lanes.count)):
                lines.append(metadata_text("thread_name", self._rank, {"name": category}, thread=thread))
                lines.append(metadata_text("thread_sort_index", self._rank, {"sort_index": thread}, thread=thread))
        return lines


def event_of(record: dict) -> Event:
    """The event of a parsed line."""
    about, category = record["args"], record["cat"]
    start = nanoseconds(record["ts"])
    return Event(
        category=category,
        name=about.get("kind", about.get("edge", "")),
        layer=about["iteration"] if category == STEP else about["layer"],
        micro_batch=about.get("micro_batch", -1),
        peer=about.get("peer", -1),
        num_bytes=about.get("bytes", 0),
        start=start,
        end=start + nanoseconds(record["dur"]),
    )


def flow_text(number: int, name: str, *, starts: bool, rank: int, thread: int, at: int) -> str:
    """One end of an arrow; both ends carry ``number`` and lie inside a slice of their thread."""
    end = '"ph":"s"' if starts else '"ph":"f","bp":"e"'
    return (
        f'{{"name":"{name}","cat":"transfer",{end},"id":{number},"pid":{rank},"tid":{thread},"ts":{microseconds(at)}}}'
    )


def metadata_text(name: str, rank: int, about: dict[str, object], *, thread: int = 0) -> str:
    """One metadata record."""
    return json.dumps({"name": name, "ph": "M", "pid": rank, "tid": thread, "args": about})


def microseconds(nanoseconds: int) -> str:
    """Exact decimal text of a time that is not negative."""
    whole, rest = divmod(nanoseconds, 1000)
    return f"{whole}.{rest:03d}"


def nanoseconds(text: str) -> int:
    """Inverse of ``microseconds``."""
    whole, _, rest = text.partition(".")
    return int(whole) * 1000 + int(rest.ljust(3, "0")[:3])
