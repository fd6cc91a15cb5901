"""Baselines whose layers hide all-to-alls at most behind their own experts: Megatron-1F1B, Tutel, Comet.

A rank does one chunk after the other, so a chunk is one operation; the systems differ in what an MoE layer takes.

Simplifications: Every rank of an all-to-all is as slow as the others. Pipeline transfers run beside compute and share
no bandwidth with all-to-alls.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter

from megatron_disagmoe.reproduction.constants import Constants
from megatron_disagmoe.reproduction.systems.layer import Costs, Job, Keep, Layer, Parts, expert_seconds
from megatron_disagmoe.reproduction.systems.pipeline import (
    Chunks,
    Do,
    Shape,
    Step,
    Work,
    busiest_compute,
    chunk_sizes,
    one_f_one_b,
    serial_program,
)
from megatron_disagmoe.reproduction.systems.program import Program


def slowed(compute: float, beside: float, sms: float) -> float:
    """Seconds of ``compute`` with communication kernels on a share ``sms`` of the SMs for ``beside`` seconds of it."""
    return compute + min(compute, beside) * sms / (1 - sms)


def waiting(costs: Costs, shape: Shape, layer: float) -> float:
    """P - 1 chunks, forward and backward, that no order spares the last rank of 1F1B; ``layer``: a layer's seconds.

    The smallest chunk counts; the last one, which has the output layer, isn't among them.
    """
    smallest = len(costs.layers) // shape.chunks
    return (shape.ranks - 1) * (smallest * layer + 2 * costs.hop)


class Serial(ABC):
    """1F1B, interleaved or not, one chunk at a time."""

    name: str
    #: Which parts of a step may be kept; see ``layer.Keep``.
    keeps: tuple[Keep, ...] = tuple(Keep)
    #: Copies of the parameters on a rank.
    copies = 1
    #: How much slower one GPU is; the pipeline rank in the middle waits for it.
    slow = 1.0

    def __init__(self, constants: Constants) -> None:
        self.constants = constants

    @abstractmethod
    def moe_seconds(self, parts: Parts, job: Job) -> float:
        """Dispatch, experts and combine of one direction."""

    def job(self, job: Job) -> Job:
        """The job as this system does it (NCCL's all-to-alls)."""
        return job

    def shapes(self, ranks: int, layers: int) -> list[int]:
        """Chunks a rank to try: 1 to what leaves every chunk a layer, powers of two and the most."""
        most = layers // ranks
        found = {v for v in (1, 2, 3, 4, 6, 8, 12) if v <= most} | {most}
        return sorted(v for v in found if v >= 1)

    def works(self, shape: Shape, rank: int) -> list[Work]:
        """What a rank does, in order; for counting what is alive."""
        return one_f_one_b(shape, rank)

    def least_seconds(self, costs: Costs, shape: Shape) -> float:
        """No step is shorter: a mean rank's work, and what the last rank waits before its first chunk and after."""
        layers = sum(
            count * self._layer_seconds(layer, do, costs.job)
            for layer, count in Counter(costs.layers).items()
            for do in (Do.FORWARD, Do.BACKWARD)
        )
        work = (layers + costs.tail_forward + costs.tail_backward) * shape.micro_batches / shape.ranks
        return work + waiting(costs, shape, layers / len(costs.layers))

    def step(self, costs: Costs, shape: Shape) -> Step:
        """Run a step."""
        sizes = chunk_sizes(costs, shape.chunks)
        seconds, free = (self.makespan(each, shape, sizes) for each in (costs, costs.without_network()))
        busiest = busiest_compute(Chunks.of(costs, sizes), shape)
        return Step(seconds, seconds - free, max(0.0, free - busiest), busiest)

    def makespan(self, costs: Costs, shape: Shape, sizes: list[int]) -> float:
        """Seconds with chunks of so many layers."""
        return self.program(costs, shape, sizes).run().makespan

    def program(self, costs: Costs, shape: Shape, sizes: list[int]) -> Program:
        """The step as operations."""
        chunks = Chunks.of(costs, sizes)

        @functools.cache
        def seconds(do: Do, chunk: int) -> float:
            forward, backward = chunks.tail(chunk)
            total = forward if do is Do.FORWARD else backward
            alike = Counter(chunks.layers[chunk]).items()
            total += sum(count * self._layer_seconds(layer, do, costs.job) for layer, count in alike)
            if self.slow > 1 and shape.rank_of(chunk) == shape.ranks // 2:
                total += (self.slow - 1) * sum(count * _compute(layer, do) for layer, count in alike)
            return total

        return serial_program(shape, lambda work: seconds(work.do, work.chunk), hop=costs.hop)

    def _layer_seconds(self, layer: Layer, do: Do, job: Job) -> float:
        directions = (layer.forward,) if do is Do.FORWARD else (layer.again, layer.backward)
        return sum(each.attention + self.moe_seconds(each, job) for each in directions)


def _compute(layer: Layer, do: Do) -> float:
    return layer.forward.compute if do is Do.FORWARD else layer.again.compute + layer.backward.compute


class Megatron(Serial):
    """Megatron-LM: interleaved 1F1B with all-to-alls that block.

    Models: ``--num-layers-per-virtual-pipeline-stage`` with the all-to-all dispatcher; pipeline transfers overlapped
    (its default). Source: Narayanan et al., arXiv 2104.04473; Megatron-LM core 0.19, ``schedules.py``.
    Simplifications: those of this module; no overlap of shared experts.
    """

    name = "megatron-1f1b"

    def moe_seconds(self, parts: Parts, job: Job) -> float:
        del job
        return parts.dispatch + parts.ffn + parts.combine


class Tutel(Serial):
    """Tutel: tokens of a layer in chunks, whose all-to-alls overlap with other chunks' experts.

    Models: adaptive pipelining of degree 1, 2, 4 or 8, the fastest, chosen for forward and backward apart; dispatch and
    combine share one communication stream. Source: Hwang et al., arXiv 2206.03382, section 3.3.
    Simplifications: those of this module. Smaller grouped products lose efficiency as the planner's curve says; every
    chunk's all-to-all has a latency of its own. Its two-dimensional all-to-all gains nothing at these message sizes.
    """

    name = "tutel"

    def moe_seconds(self, parts: Parts, job: Job) -> float:
        degrees = [d for d in (1, 2, 4, 8) if d <= self.constants.tutel_most_chunks]
        sms, latency = self.constants.communication_sms, _latency(job)
        return min(chunked(parts, degree, sms, latency, _smaller(job, degree)) for degree in degrees)


@functools.lru_cache(maxsize=4096)
def chunked(parts: Parts, degree: int, sms: float, latency: float, smaller: float) -> float:
    """A layer's MoE part in ``degree`` chunks: dispatches first, combines as chunks are ready.

    ``smaller``: how much longer experts take in all for tokens that come in so many parts.
    """
    if degree == 1:
        return parts.dispatch + parts.ffn + parts.combine
    program = Program()
    beside = parts.communication * (degree - 1) / degree
    ffn = slowed(parts.ffn, beside, sms) * smaller / degree
    sent = [program.add(_part(parts.dispatch, degree, latency), stream="network") for _ in range(degree)]
    done = [program.add(ffn, (number,), stream="compute") for number in sent]
    for number in done:
        program.add(_part(parts.combine, degree, latency), (number,), stream="network")
    return program.run().makespan


def _latency(job: Job) -> float:
    network = job.cluster.network
    there = job.expert_parallel > job.cluster.pools[0].gpus_per_node
    return (network.latency_us if there else network.local_latency_us) * 1e-6


def _part(seconds: float, degree: int, latency: float) -> float:
    return (seconds - latency) / degree + latency if seconds > latency else seconds / degree


def _smaller(job: Job, degree: int) -> float:
    """What ``chunked`` calls ``smaller``, from the planner's efficiency curve."""
    whole = expert_seconds(job, job.tokens)
    return degree * expert_seconds(job, job.tokens / degree) / whole


class Comet(Serial):
    """Comet: all-to-alls and experts' products fused tile by tile.

    Models: of the shorter of experts and all-to-alls, ``comet_hidden`` is hidden behind the other. Source: Zhang et
    al., arXiv 2502.19811, which reports 86.5%. Simplifications: those of this module; one share for every size.
    """

    name = "comet"

    def moe_seconds(self, parts: Parts, job: Job) -> float:
        del job
        ffn = slowed(parts.ffn, parts.communication, self.constants.communication_sms)
        return ffn + parts.communication - self.constants.comet_hidden * min(parts.ffn, parts.communication)
