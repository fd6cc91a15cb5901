"""What F stages cost on one GPU; vectorised over the number of rows.

Rows are (token, expert) pairs; a rank gets ``T k / N`` of a micro-batch of T tokens where routing is even.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_disagmoe.planner.activations import Recompute, expert_bytes
from megatron_disagmoe.planner.arrays import Floats
from megatron_disagmoe.planner.cluster_spec import Network, Pool
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.operations import Does, expert_operations
from megatron_disagmoe.planner.timing import Timer


@dataclass(frozen=True)
class FfnSide:
    """Seconds and bytes on one GPU for one micro-batch; arrays shaped like the rows.

    ``backward`` includes ``again``, what is run again; ``weight`` is the weight gradients' part. ``kept``: bytes from
    forward to backward; ``workspace``: bytes alive only while a stage runs.
    """

    forward: Floats
    backward: Floats
    again: Floats
    weight: Floats
    kept: Floats
    workspace: Floats


def ffn_side(
    model: ModelSpec,
    pool: Pool,
    network: Network,
    *,
    rows: ArrayLike,
    experts_per_rank: ArrayLike,
    tensor_parallel: int,
    recompute: Recompute,
) -> FfnSide:
    """Costs of an F stage.

    Args:
        rows: rows that one rank gets of a micro-batch.
        experts_per_rank: E / N.
        tensor_parallel: ETP; the ranks of an expert tensor group share their rows over NVLink.
        recompute: what of the forward is run again.
    """
    timer, width = Timer(pool.gpu), pool.gpu.bytes_per_number
    rows = np.asarray(rows, dtype=np.float64)
    per_expert = rows / np.asarray(experts_per_rank)
    forward: Floats = np.full(rows.shape, timer.overhead)
    backward: Floats = np.full(rows.shape, 2 * timer.overhead)
    again, weight = np.zeros(rows.shape), np.zeros(rows.shape)
    for operation in expert_operations(model):
        amount = operation.amount * rows / tensor_parallel
        if operation.does is Does.GEMM:
            one = timer.grouped_gemm(amount, tokens_per_expert=per_expert)
            weight = weight + one
        else:
            one = timer.memory(amount * width)
        repeated = one if operation.again <= recompute else np.zeros(rows.shape)
        forward, backward, again = forward + one, backward + operation.backward * one + repeated, again + repeated
    if tensor_parallel > 1:
        # Rows are gathered before and their partial outputs reduced after; backward the other way round.
        moved = rows * model.hidden_size * width * (tensor_parallel - 1) / tensor_parallel
        one = moved / (pool.nvlink_gb_per_s * 1e9 * pool.nvlink_efficiency) + network.local_latency_us * 1e-6
        repeated = one if recompute is Recompute.FULL else np.zeros(rows.shape)
        forward, backward, again = forward + 2 * one, backward + 2 * one + repeated, again + repeated
    measured = pool.gpu.calibration
    gradients = measured.ffn * measured.backward
    backward = (backward - again) * gradients + again * measured.ffn
    forward, again, weight = forward * measured.ffn, again * measured.ffn, weight * gradients
    whole = expert_bytes(model, recompute=Recompute.NONE, width=width, tensor_parallel=tensor_parallel)
    kept = expert_bytes(model, recompute=recompute, width=width, tensor_parallel=tensor_parallel)
    return FfnSide(forward, backward, again, weight, kept * rows, whole * rows)
