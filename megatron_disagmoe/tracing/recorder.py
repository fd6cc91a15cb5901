"""Records what one rank does. Appending to a list is all that happens between two stages.

After each step the list goes to ``rank-NNNNN.part`` in Python's marshal form, twenty times cheaper than text;
``close`` turns that into ``rank-NNNNN.json``. What a killed run leaves is turned by the reader.

Every time is ``time.perf_counter_ns`` of this rank; ``clock_sync`` records how far that clock is from the
others'. Calls may come from any thread and late (a send is often seen to complete long after it was posted): the
reader sorts by time, and takes an event to belong to the step in which it began.
"""

from __future__ import annotations

import atexit
import marshal
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

from megatron_disagmoe.schedules.actions import Action, Edge, Group
from megatron_disagmoe.tracing.chrome import (
    CLOCK_RECORD,
    COMPUTE,
    RANK_RECORD,
    RECEIVE,
    SEND,
    STEP,
    WAIT,
    PlainEvent,
    SliceWriter,
    metadata_text,
)

FORMAT_VERSION = 1
PART_SUFFIX = ".part"


def edge_name(edge: Edge, gradient: bool) -> str:
    """Name of an edge in traces: ``M2N``, for gradients ``dM2N``."""
    return f"d{edge.value}" if gradient else edge.value


def trace_path(directory: str | Path, rank: int) -> Path:
    """The file of one rank."""
    return Path(directory) / f"rank-{rank:05d}.json"


class Recorder(Protocol):
    """What the executor calls. All times are ``perf_counter_ns`` readings of this rank."""

    enabled: bool
    """Whether anything is kept; False lets a caller skip reading the clock."""

    def compute(self, action: Action, start_ns: int, end_ns: int) -> None:
        """``action`` ran, waiting left out."""

    def wait(self, edge: str, layer: int, micro_batch: int, peer: int, start_ns: int, end_ns: int) -> None:
        """The rank stood still until the message of ``edge`` from rank ``peer`` was there."""

    def send(
        self, edge: str, layer: int, micro_batch: int, peer: int, start_ns: int, end_ns: int, num_bytes: int = 0
    ) -> None:
        """A message to rank ``peer``, from its post until it was seen complete; the post twice if it never was."""

    def receive(
        self, edge: str, layer: int, micro_batch: int, peer: int, start_ns: int, end_ns: int, num_bytes: int = 0
    ) -> None:
        """A message from rank ``peer``, from the post of its receive until it was seen to be complete."""

    def step(self, iteration: int, start_ns: int, end_ns: int) -> None:
        """A step is over: write what was recorded."""

    def clock_sync(self, offset_ns: int, at_ns: int | None = None) -> None:
        """This rank's clock plus ``offset_ns`` was the reference's at ``at_ns`` (now). More readings correct drift."""

    def close(self) -> None:
        """Write the rest and close the file; later calls are errors. Closing twice is not."""


class NullRecorder:
    """Keeps nothing."""

    enabled = False

    def compute(self, action: Action, start_ns: int, end_ns: int) -> None:
        """Nothing."""

    def wait(self, edge: str, layer: int, micro_batch: int, peer: int, start_ns: int, end_ns: int) -> None:
        """Nothing."""

    def send(
        self, edge: str, layer: int, micro_batch: int, peer: int, start_ns: int, end_ns: int, num_bytes: int = 0
    ) -> None:
        """Nothing."""

    def receive(
        self, edge: str, layer: int, micro_batch: int, peer: int, start_ns: int, end_ns: int, num_bytes: int = 0
    ) -> None:
        """Nothing."""

    def step(self, iteration: int, start_ns: int, end_ns: int) -> None:
        """Nothing."""

    def clock_sync(self, offset_ns: int, at_ns: int | None = None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TraceRecorder:
    """Writes ``rank-NNNNN.json`` in ``directory``, a Chrome trace of this rank.

    Args:
        rank: global rank.
        group: the group the rank belongs to.
        directory: made if it is missing; an older trace of this rank is replaced.
        replica: which copy of the ring the rank belongs to.
    """

    enabled = True

    def __init__(self, rank: int, group: Group, directory: str | Path, *, replica: int = 0) -> None:
        self._events: list[PlainEvent] = []
        self._path = trace_path(directory, rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._file: BinaryIO = self._path.with_suffix(PART_SUFFIX).open("wb")
        self._write((FORMAT_VERSION, rank, str(group), replica))
        atexit.register(self.close)  # a run that ends by an exception has a trace too

    def compute(self, action: Action, start_ns: int, end_ns: int) -> None:
        kind, layer, micro_batch = action[:3]
        self._events.append((COMPUTE, kind.value, layer, micro_batch, -1, 0, start_ns, end_ns))

    def wait(self, edge: str, layer: int, micro_batch: int, peer: int, start_ns: int, end_ns: int) -> None:
        self._events.append((WAIT, edge, layer, micro_batch, peer, 0, start_ns, end_ns))

    def send(
        self, edge: str, layer: int, micro_batch: int, peer: int, start_ns: int, end_ns: int, num_bytes: int = 0
    ) -> None:
        self._events.append((SEND, edge, layer, micro_batch, peer, num_bytes, start_ns, end_ns))

    def receive(
        self, edge: str, layer: int, micro_batch: int, peer: int, start_ns: int, end_ns: int, num_bytes: int = 0
    ) -> None:
        self._events.append((RECEIVE, edge, layer, micro_batch, peer, num_bytes, start_ns, end_ns))

    def step(self, iteration: int, start_ns: int, end_ns: int) -> None:
        self._events.append((STEP, "", iteration, -1, -1, 0, start_ns, end_ns))
        self._write_events()

    def clock_sync(self, offset_ns: int, at_ns: int | None = None) -> None:
        self._write((offset_ns, time.perf_counter_ns() if at_ns is None else at_ns))

    def close(self) -> None:
        if self._file.closed:
            return
        atexit.unregister(self.close)
        self._write_events()
        self._file.close()
        part = self._path.with_suffix(PART_SUFFIX)
        finish_part(part)
        part.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_events(self) -> None:
        number = len(self._events)  # other threads may append while we write
        self._write(self._events[:number])
        del self._events[:number]

    def _write(self, piece: Any) -> None:
        self._file.write(marshal.dumps(piece))
        self._file.flush()


def finish_part(part: Path) -> Path:
    """Turn ``rank-NNNNN.part`` into ``rank-NNNNN.json`` beside it, as far as it goes; returns the new path.

    A ``.part`` is read with ``marshal``, so only files of this program and Python version will do.

    Raises:
        ValueError: where ``part`` was not written by a recorder of this version.
    """
    path = part.with_suffix(".json")
    with part.open("rb") as source:
        pieces = _pieces(source)
        header = next(pieces, None)
        if not (isinstance(header, tuple) and len(header) == 4 and header[0] == FORMAT_VERSION):
            raise ValueError(f"{part} was not written by a trace recorder of version {FORMAT_VERSION}")
        _, rank, group, replica = header
        writer = SliceWriter(rank, group[0])
        about = {"version": FORMAT_VERSION, "rank": rank, "group": group, "replica": replica}
        with path.open("w", encoding="utf-8") as target:
            target.write("[\n" + metadata_text(RANK_RECORD, rank, about))
            for line in rank_metadata(rank, group, replica):
                target.write(",\n" + line)
            for piece in pieces:
                if isinstance(piece, tuple):
                    offset, at = piece
                    lines = [metadata_text(CLOCK_RECORD, rank, {"offset_ns": offset, "at_ns": at})]
                else:
                    lines = [writer.line(event)[0] for event in piece]
                target.writelines(",\n" + line for line in lines)
            target.writelines(",\n" + line for line in writer.threads())
            target.write("\n]\n")
    return path


def _pieces(source: BinaryIO) -> Iterator:
    """What was written, piece by piece; the last may be cut off where the run was killed."""
    while True:
        try:
            yield marshal.load(source)
        except (EOFError, ValueError, TypeError):
            return


def create_recorder(directory: str | Path | None, rank: int, group: Group, *, replica: int = 0) -> Recorder:
    """A recorder that writes into ``directory``, or one that keeps nothing where that is None."""
    return NullRecorder() if directory is None else TraceRecorder(rank, group, directory, replica=replica)


def rank_metadata(rank: int, group: str, replica: int) -> list[str]:
    """How viewers name and order the process of a rank."""
    return [
        metadata_text("process_name", rank, {"name": rank_label(rank, group, replica)}),
        metadata_text("process_sort_index", rank, {"sort_index": rank}),
    ]


def rank_label(rank: int, group: str, replica: int) -> str:
    """``A0 rank 3``, with the replica where it is not the first."""
    return f"{group} rank {rank}{f' replica {replica}' if replica else ''}"
