"""A tiny mixture-of-experts GPT for tests that train: its flags, and what its log must show."""

from __future__ import annotations

from megatron_disagmoe.local_job import Result
from megatron_disagmoe.training_log import TrainingLog

FLAGS = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm
    --swiglu --disable-bias-linear --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-token-dispatcher-type alltoall --micro-batch-size 1 --global-batch-size 4 --train-iters 5
    --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer --vocab-size 257
    --log-interval 1 --eval-interval 1000 --eval-iters 1 --seed 1234
""".split()

EXPERT_PARALLEL = ["--expert-model-parallel-size", "2"]


def losses(output: str) -> list[float]:
    """The ``lm loss`` of every step in a log.

    Megatron prints as the second value after a start the mean of the first two steps (it resets its sums only from
    the second printed line on): two logs are comparable line by line only if both start at the same step.
    """
    return [step.fields["lm loss"] for step in TrainingLog.read(output.splitlines()).steps]


def step_losses(result: Result) -> list[float]:
    """The losses of a run step by step, with the mean in the second line (see ``losses``) taken apart."""
    logged = losses(result.output)
    return [logged[0], 2 * logged[1] - logged[0], *logged[2:]]
