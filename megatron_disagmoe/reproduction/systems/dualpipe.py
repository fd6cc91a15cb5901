"""DualPipe, and the fair rival: DualPipe whose tokens cross to a node once."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from megatron_disagmoe.reproduction.systems.layer import Costs, Job, Keep, Parts
from megatron_disagmoe.reproduction.systems.overlapped import Writer, least_overlapped
from megatron_disagmoe.reproduction.systems.pipeline import (
    Chunks,
    Do,
    Shape,
    Step,
    Work,
    busiest_compute,
    chunk_sizes,
    connect,
)
from megatron_disagmoe.reproduction.systems.program import Program
from megatron_disagmoe.reproduction.systems.serial import Serial


class Turn(NamedTuple):
    """What a rank does next: one work, or a forward and a backward overlapped. ``split``: weight gradients later."""

    works: tuple[Work, ...]
    split: bool = False


class DualPipe(Serial):
    """DualPipe: micro-batches enter the pipeline from both ends, and forwards overlap with backwards.

    Models: the eight steps of the published schedule, overlapped pairs at layer level, split backward in the steps that
    use it, two copies of the parameters (rank r holds stages r and P - 1 - r; the copies share the optimizer's state).
    Source: DeepSeek-V3, arXiv 2412.19437, section 3.2.1, and its repository's ``dualpipe.py``.
    Simplifications: those of ``overlapped``. Needs an even P and at least 2 P micro-batches. All-to-alls are NCCL's, as
    for the other baselines; DeepSeek's own kernels are the rival ``DualPipePerNode``.
    """

    name = "dualpipe"
    keeps = (Keep.ALL, Keep.SELECTIVE)
    copies = 2

    def moe_seconds(self, parts: Parts, job: Job) -> float:
        del job
        return parts.dispatch + parts.ffn + parts.combine

    def shapes(self, ranks: int, layers: int) -> list[int]:
        """One chunk a rank and direction."""
        return [1] if ranks % 2 == 0 and ranks <= layers else []

    def fits(self, shape: Shape) -> bool:
        """Whether there are enough micro-batches, and equally many for both directions."""
        return shape.micro_batches >= 2 * shape.ranks and shape.micro_batches % 2 == 0

    def least_seconds(self, costs: Costs, shape: Shape) -> float:
        return least_overlapped(costs, shape)

    def works(self, shape: Shape, rank: int) -> list[Work]:
        found: list[Work] = []
        for turn in turns(shape, rank):
            found += turn.works
        return found

    def step(self, costs: Costs, shape: Shape) -> Step:
        sizes = chunk_sizes(costs, shape.chunks)
        seconds, free = (self.makespan(each, shape, sizes) for each in (costs, costs.without_network()))
        busiest = busiest_compute(Chunks.of(costs, sizes), shape, copies=2)
        return Step(seconds, seconds - free, max(0.0, free - busiest), busiest)

    def program(self, costs: Costs, shape: Shape, sizes: list[int]) -> Program:
        chunks, middle = Chunks.of(costs, sizes), shape.ranks // 2
        writer = Writer(chunks, self.constants.communication_sms, self.slow, middle)
        for rank in range(shape.ranks):
            for turn in turns(shape, rank):
                _write(writer, rank, turn)
        connect(
            writer.program,
            shape,
            writer.done,
            hop=costs.hop,
            first=writer.first,
            rank_of=lambda work: place(shape, work),
        )
        return writer.program


class DualPipePerNode(DualPipe):
    """The fair rival: DualPipe with one copy of a token per node, at RDMA's full efficiency.

    Models: DeepSeek's own all-to-alls, which send a token to a node once and fan it out over NVLink; same bandwidth as
    AF-pipe's transport. Source: DeepSeek-V3, arXiv 2412.19437, section 3.2.2 (20 SMs); DeepEP.
    Simplifications: those of ``DualPipe``; routing is even, as everywhere.
    """

    name = "dualpipe-per-node"

    def job(self, job: Job) -> Job:
        return dataclasses.replace(job, dispatch="per-node", nccl=1.0)


def _write(writer: Writer, rank: int, turn: Turn) -> None:
    first = turn.works[0]
    if len(turn.works) == 2:
        writer.pair(rank, *turn.works)
    elif first.do is Do.FORWARD:
        writer.forward(rank, first)
    elif first.do is Do.BACKWARD:
        writer.backward(rank, first, split=turn.split)
    else:
        writer.weights(rank, first)


def place(shape: Shape, work: Work) -> int:
    """Rank of a chunk: micro-batches of the second half enter at the other end."""
    reverse = work.micro_batch >= shape.micro_batches // 2
    return shape.ranks - 1 - work.chunk if reverse else work.chunk


def turns(shape: Shape, rank: int) -> Iterator[Turn]:
    """What a rank does, in order: the eight steps of the published schedule.

    Phase 0 is the direction that enters at the nearer end. ``near``: how far a rank is from that end.
    """
    p, half_chunks = shape.ranks, shape.micro_batches // 2
    half, near = p // 2, min(rank, p - 1 - rank)
    is_far = rank >= half
    is_middle = near == half - 1
    counts = {(do, phase): 0 for do in (Do.FORWARD, Do.BACKWARD) for phase in (0, 1)}
    waiting: deque[Work] = deque()

    def next_of(do: Do, phase: int) -> Work:
        micro_batch = counts[do, phase]
        counts[do, phase] += 1
        reverse = phase ^ is_far
        chunk = p - 1 - rank if reverse else rank
        return Work(do, chunk, micro_batch + half_chunks * reverse)

    def forward(phase: int) -> Turn:
        return Turn((next_of(Do.FORWARD, phase),))

    def backward(phase: int, *, split: bool = False) -> Turn:
        work = next_of(Do.BACKWARD, phase)
        if split:
            waiting.append(Work(Do.WEIGHT, work.chunk, work.micro_batch))
        return Turn((work,), split)

    def both(forward_phase: int, backward_phase: int) -> Turn:
        return Turn((next_of(Do.FORWARD, forward_phase), next_of(Do.BACKWARD, backward_phase)))

    for _ in range(2 * (half - near - 1)):
        yield forward(0)
    for _ in range(near + 1):
        yield forward(0)
        yield forward(1)
    for _ in range(half - near - 1):
        yield backward(1, split=True)
        yield Turn((waiting.popleft(),))
        yield forward(1)
    for number in range(half_chunks - p + near + 1):
        if number == 0 and is_middle:
            yield forward(0)
            yield backward(1)
        else:
            yield both(0, 1)
        yield both(1, 0)
    for _ in range(half - near - 1):
        yield backward(1)
        yield both(1, 0)
    split = False
    for number in range(near + 1):
        split |= number == (near + 1) // 2 and near % 2 == 1
        yield backward(1, split=split)
        split |= number == (near + 1) // 2 and near % 2 == 0
        yield backward(0, split=split)
    for _ in range(half - near - 1):
        yield Turn((waiting.popleft(),))
        yield backward(0, split=True)
    for _ in range(near + 1):
        yield Turn((waiting.popleft(),))
