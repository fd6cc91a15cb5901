"""Tiny AF-pipe training jobs, and what each step gave in full precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.local_job import Job, Result, run
from megatron_disagmoe.parity.step_values import ENVIRONMENT, StepValues, read

STEPS = 3
NUM_LAYERS = 4
MICRO_BATCHES = 8

FLAGS = (
    f"--num-layers {NUM_LAYERS} --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 32 --max-position-embeddings 32 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 "
    "--ffn-hidden-size 64 --normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0 "
    f"--micro-batch-size 1 --global-batch-size {MICRO_BATCHES} --train-iters {STEPS} --lr 1e-2 "
    "--lr-decay-style constant --clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer --vocab-size 131 "
    "--log-interval 1 --eval-interval 1000 --eval-iters 1 --seed 1234 --af-pipe"
).split()


@dataclass(frozen=True)
class Training:
    """One job: ``world_size`` ranks with ``FLAGS`` and ``flags``."""

    world_size: int
    flags: str


def train(jobs: Mapping[str, Training], folder: Path) -> tuple[dict[str, list[StepValues]], dict[str, Result]]:
    """Run every job in one fork server: its steps as the last rank saw them, and how it ended."""
    results = run(
        [
            Job(
                name,
                job.world_size,
                [*FLAGS, *job.flags.split()],
                environment={ENVIRONMENT: str(folder / name / "steps")},
            )
            for name, job in jobs.items()
        ],
        folder,
    )
    steps = {}
    for name in jobs:
        ranks = read(folder / name / "steps")
        steps[name] = ranks[-1] if ranks else []
    return steps, dict(zip(jobs, results, strict=True))
