"""Megatron-LM with its own batch-level overlap of expert-parallel communication."""

from __future__ import annotations

from megatron_disagmoe.reproduction.systems.layer import Costs, Job, Keep, Parts
from megatron_disagmoe.reproduction.systems.overlapped import Writer, least_overlapped
from megatron_disagmoe.reproduction.systems.pipeline import Chunks, Do, Shape, Work, connect, one_f_one_b
from megatron_disagmoe.reproduction.systems.program import Program
from megatron_disagmoe.reproduction.systems.serial import Serial, waiting


class BatchOverlap(Serial):
    """Megatron-LM with ``--overlap-moe-expert-parallel-comm`` (combined 1F1B).

    Models: in the steady phase of interleaved 1F1B a forward and the backward of another micro-batch run as one
    overlapped pair; warm-up and cool-down don't overlap. One forward more than usual runs ahead, so that the two are of
    different micro-batches. Source: Megatron-LM's guide "Combined 1F1B"; ``combined_1f1b.py`` of core 0.19.
    Simplifications: those of ``overlapped``; weight gradients stay in the backward. Needs virtual stages where there
    is a pipeline, and keeps everything or recomputes selectively (full recomputation is not for it).
    """

    name = "megatron-overlap"
    keeps = (Keep.ALL, Keep.SELECTIVE)

    def moe_seconds(self, parts: Parts, job: Job) -> float:
        del job
        return parts.dispatch + parts.ffn + parts.combine

    def shapes(self, ranks: int, layers: int) -> list[int]:
        """Two or more virtual stages where there is a pipeline."""
        possible = super().shapes(ranks, layers)
        return possible if ranks == 1 else [v for v in possible if v > 1]

    def least_seconds(self, costs: Costs, shape: Shape) -> float:
        path = sum(
            part.compute + part.communication
            for layer in costs.layers
            for part in (layer.forward, layer.backward, layer.again)
        )
        return least_overlapped(costs, shape) + waiting(costs, shape, path / len(costs.layers))

    def works(self, shape: Shape, rank: int) -> list[Work]:
        return one_f_one_b(shape, rank, ahead=1)

    def program(self, costs: Costs, shape: Shape, sizes: list[int]) -> Program:
        chunks, middle = Chunks.of(costs, sizes), shape.ranks // 2
        writer = Writer(chunks, self.constants.communication_sms, self.slow, middle)
        for rank in range(shape.ranks):
            works = self.works(shape, rank)
            number = 0
            while number < len(works):
                work = works[number]
                after = works[number + 1] if number + 1 < len(works) else None
                if work.do is Do.FORWARD and after is not None and after.do is Do.BACKWARD:
                    writer.pair(rank, work, after)
                    number += 2
                    continue
                if work.do is Do.FORWARD:
                    writer.forward(rank, work)
                else:
                    writer.backward(rank, work)
                number += 1
        connect(writer.program, shape, writer.done, hop=costs.hop, first=writer.first)
        return writer.program
