"""What baselines have in common: chunks of layers on pipeline ranks, the order of 1F1B, and a step's figures.

All expert-parallel ranks of a pipeline rank do the same at the same time, so one of them stands for all.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megatron_disagmoe.reproduction.systems.layer import Costs, Layer
from megatron_disagmoe.reproduction.systems.program import Program


class Do(enum.Enum):
    """What a rank does with a chunk."""

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"


class Work(NamedTuple):
    """One chunk (numbered along the model) of one micro-batch."""

    do: Do
    chunk: int
    micro_batch: int


def label(work: Work) -> str:
    """Short, for traces: ``F chunk 3 m5``."""
    return f"{work.do.value} chunk {work.chunk} m{work.micro_batch}"


@dataclass(frozen=True)
class Shape:
    """P pipeline ranks, v chunks on each, n micro-batches; chunk c lies on rank c mod P."""

    ranks: int
    chunks_per_rank: int
    micro_batches: int

    @property
    def chunks(self) -> int:
        return self.ranks * self.chunks_per_rank

    def rank_of(self, chunk: int) -> int:
        """Where a chunk lies."""
        return chunk % self.ranks


@dataclass(frozen=True)
class Chunks:
    """Layers of every chunk, in order; the last chunk has the tail too."""

    layers: tuple[tuple[Layer, ...], ...]
    tail_forward: float
    tail_backward: float

    @classmethod
    def of(cls, costs: Costs, sizes: list[int]) -> Chunks:
        """Chunks of so many layers each."""
        layers, start = [], 0
        for size in sizes:
            layers.append(costs.layers[start : start + size])
            start += size
        return cls(tuple(layers), costs.tail_forward, costs.tail_backward)

    def tail(self, chunk: int) -> tuple[float, float]:
        """Forward and backward of the output layer where the chunk has it."""
        is_last = chunk == len(self.layers) - 1
        return (self.tail_forward, self.tail_backward) if is_last else (0.0, 0.0)

    def compute(self, chunk: int) -> float:
        """Compute of one micro-batch, both directions."""
        layers = self.layers[chunk]
        inside = sum(each.forward.compute + each.backward.compute + each.again.compute for each in layers)
        return inside + sum(self.tail(chunk))


def chunk_sizes(costs: Costs, count: int) -> list[int]:
    """Layers of ``count`` chunks that take as long as each other, as nearly as whole layers allow.

    The last one, which has the output layer, gets fewer (Megatron's ``--account-for-loss-in-pipeline-split``, or a
    layout of one's own).
    """
    total = len(costs.layers)
    if not 1 <= count <= total:
        raise ValueError(f"{count} chunks for {total} layers: every chunk needs one")
    if count == 1:
        return [total]
    mean = sum(layer.total for layer in costs.layers) / total
    tail = costs.tail_forward + costs.tail_backward

    def longest(last: int) -> float:
        return max(-(-(total - last) // (count - 1)) * mean, last * mean + tail)

    last = min(range(1, total - count + 2), key=lambda size: (longest(size), -size))
    each, more = divmod(total - last, count - 1)
    return [each + (number < more) for number in range(count - 1)] + [last]


@dataclass(frozen=True)
class Step:
    """Seconds of a pipeline, without reducing gradients.

    ``exposed``: how much shorter it would be on a network that takes no time. ``bubble``: what is left then beside the
    busiest rank's compute.
    """

    seconds: float
    exposed: float
    bubble: float
    busiest: float


def busiest_compute(chunks: Chunks, shape: Shape, *, copies: int = 1) -> float:
    """Compute of the busiest rank in a step. ``copies`` 2: every rank holds its chunk and its mirror's, half each."""
    per_rank = [0.0] * shape.ranks
    for chunk in range(shape.chunks):
        compute = chunks.compute(chunk) * shape.micro_batches / copies
        per_rank[shape.rank_of(chunk)] += compute
        if copies == 2:
            per_rank[shape.ranks - 1 - shape.rank_of(chunk)] += compute
    return max(per_rank)


def one_f_one_b(shape: Shape, rank: int, *, ahead: int = 0) -> list[Work]:
    """Megatron's interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2); v = 1 is plain 1F1B.

    Micro-batches go in groups of P (evened out where P doesn't divide n). ``ahead``: forwards more before the first
    backward.
    """
    p, v, n = shape.ranks, shape.chunks_per_rank, shape.micro_batches
    order = []
    for start in range(0, n, p):
        group = range(start, min(start + p, n))
        order += [(chunk, micro_batch) for chunk in range(v) for micro_batch in group]
    forward = [Work(Do.FORWARD, chunk * p + rank, micro_batch) for chunk, micro_batch in order]
    backward = [Work(Do.BACKWARD, (v - 1 - chunk) * p + rank, micro_batch) for chunk, micro_batch in order]
    warm_up = p - rank - 1 if v == 1 else 2 * (p - rank - 1) + (v - 1) * p
    warm_up = min(warm_up + ahead, len(forward))
    works = forward[:warm_up]
    for number, work in enumerate(forward[warm_up:]):
        works += [work, backward[number]]
    return works + backward[len(forward) - warm_up :]


def peak_live(works: list[Work]) -> dict[int, int]:
    """Most micro-batches of each of a rank's chunks alive at the moment when most are alive in all.

    A chunk lives until its backward, or until its weight gradients where they come later.
    """
    split = {(work.chunk, work.micro_batch) for work in works if work.do is Do.WEIGHT}
    live: dict[int, int] = {}
    peak: dict[int, int] = {}
    most = total = 0
    for work in works:
        if work.do is Do.FORWARD:
            live[work.chunk] = live.get(work.chunk, 0) + 1
            total += 1
            if total > most:
                most, peak = total, dict(live)
        elif work.do is Do.WEIGHT or (work.chunk, work.micro_batch) not in split:
            live[work.chunk] -= 1
            total -= 1
    return peak


#: Seconds of one chunk of one micro-batch, forward or backward, where nothing else runs beside it.
ChunkTime = Callable[[Work], float]


def serial_program(shape: Shape, seconds: ChunkTime, *, hop: float) -> Program:
    """1F1B where a rank does one chunk at a time; ``hop``: seconds from rank to rank, not blocking."""
    program = Program()
    done: dict[Work, int] = {}
    for rank in range(shape.ranks):
        for work in one_f_one_b(shape, rank):
            done[work] = program.add(seconds(work), stream=("compute", rank), name=label(work))
    connect(program, shape, done, hop=hop)
    return program


def connect(
    program: Program,
    shape: Shape,
    done: dict[Work, int],
    *,
    hop: float,
    first: dict[Work, int] | None = None,
    rank_of: Callable[[Work], int] | None = None,
) -> None:
    """Let every chunk wait for the one before it, forward and backward, over the network where ranks differ.

    ``done``: the operation that ends a chunk. ``first``: the one that begins it, where that is another.
    ``rank_of``: where a chunk lies, if not on rank c mod P.
    """
    begin = done if first is None else first
    where = rank_of or (lambda work: shape.rank_of(work.chunk))
    for work in list(begin):
        if work.do is Do.WEIGHT:
            continue
        step = -1 if work.do is Do.FORWARD else 1
        source = Work(work.do, work.chunk + step, work.micro_batch)
        if work.do is Do.BACKWARD and work.chunk == shape.chunks - 1:
            source = Work(Do.FORWARD, work.chunk, work.micro_batch)
        if source in done:
            before = done[source] if where(work) == where(source) else program.add(hop, (done[source],), name="hop")
            program.wait(begin[work], before)
