"""Which shapes of the paper's AF-pipe are looked at: sizes, then the levers of memory for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.space import FFN_LEVERS
from megatron_disagmoe.reproduction.systems.af_paper import Shape
from megatron_disagmoe.reproduction.systems.choose import CUTS, Task

#: A:F ratios that are tried, N / M; attention ranks; the least share of the cluster's GPUs, and how near the batch is.
RATIOS = (2.0, 1.5, 1.25, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 1 / 3, 0.25)
_RANKS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96)
_MOST_GROUPS, _USED, _NEAR = 16, 0.93, 0.13


def shapes(task: Task) -> Iterator[Shape]:
    """Every size worth a look, without levers of memory: any ratio that uses most of the GPUs and nearly the batch.

    Throughputs are compared, so a batch need not be met exactly: 80 attention ranks have no common batch with 64.
    """
    world = task.cluster.num_gpus
    model, c = task.model, task.constants
    for tp, cp in CUTS:
        if tp > model.attention.tensor_parallel_limit or task.sequence % (2 * tp * cp):
            continue
        for groups in range(1, min(_MOST_GROUPS, model.num_moe_layers) + 1):
            for ranks in (m for m in _RANKS if m * tp * cp * groups < world):
                gpus = ranks * tp * cp
                for ffn in sorted({round(gpus * ratio) for ratio in RATIOS}):
                    block = gpus + ffn
                    if not 1 <= ffn <= model.moe.num_experts or block * groups > world:
                        continue
                    replicas = world // (block * groups)
                    n = max(1, round(task.batch / (ranks * replicas * c.micro_batch_size)))
                    near = abs(n * ranks * replicas * c.micro_batch_size / task.batch - 1) <= _NEAR
                    if near and replicas * groups * block >= _USED * world:
                        yield Shape(groups, ranks, ffn, replicas, tp, cp)


def levers(shape: Shape) -> Iterator[Shape]:
    """A shape with every lever of memory, from the cheapest in time."""
    for recompute in Recompute:
        for lever in FFN_LEVERS:
            yield replace(shape, recompute_attention=recompute, ffn_lever=lever)
