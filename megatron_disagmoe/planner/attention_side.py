"""What A stages cost on one GPU: forward and backward times and bytes kept, stage by stage.

Legend: t tokens of a micro-batch on one GPU, L MoE layers; arrays have one entry a stage, A(0) .. A(L) (the tail).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.planner.activations import Recompute, logits_bytes, stage_bytes
from megatron_disagmoe.planner.arrays import Floats
from megatron_disagmoe.planner.cluster_spec import Network, Pool
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.operations import ATTENTION_BACKWARD, Does, Operation, stage_operations
from megatron_disagmoe.planner.timing import Timer


@dataclass(frozen=True)
class AttentionSizes:
    """How one attention rank is cut, and what it gets of a micro-batch."""

    sequence: int
    micro_batch_size: int
    tensor_parallel: int
    context_parallel: int
    recompute: Recompute

    @property
    def gpus(self) -> int:
        """GPUs of one attention rank."""
        return self.tensor_parallel * self.context_parallel

    @property
    def tokens_per_rank(self) -> int:
        return self.micro_batch_size * self.sequence

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on one GPU (tensor parallelism with sequence parallelism)."""
        return self.tokens_per_rank / self.gpus


@dataclass(frozen=True)
class AttentionSide:
    """Seconds and bytes on one GPU for one micro-batch.

    ``backward`` includes what is run again; ``again`` is that part, ``weight`` the weight gradients' part. ``kept``:
    bytes from forward to backward. ``workspace``, ``tail_workspace``: bytes alive only while a stage runs.
    """

    forward: Floats
    backward: Floats
    again: Floats
    weight: Floats
    kept: Floats
    workspace: float
    tail_workspace: float


@dataclass(frozen=True)
class _Times:
    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    weight: float = 0.0

    def __add__(self, other: _Times) -> _Times:
        return _Times(
            self.forward + other.forward,
            self.backward + other.backward,
            self.again + other.again,
            self.weight + other.weight,
        )

    def scaled(self, forward: float, backward: float) -> _Times:
        """Forward, and what is run again of it, by one factor, gradients by another."""
        again = self.again * forward
        return _Times(
            self.forward * forward, (self.backward - self.again) * backward + again, again, self.weight * backward
        )


@dataclass(frozen=True)
class StageTable:
    """The A stages of a model at one sequence length; stages that do the same are listed once.

    ``operations[alike[i]]`` are those of A(i); ``like`` is a stage of each kind.
    """

    operations: tuple[tuple[Operation, ...], ...]
    like: tuple[int, ...]
    alike: tuple[int, ...]


def stage_table(model: ModelSpec, *, sequence: int) -> StageTable:
    """Every stage's operations, once per kind of stage."""
    seen: dict[tuple[Operation, ...], int] = {}
    like: list[int] = []
    alike = []
    for stage in range(model.num_moe_layers + 1):
        operations = stage_operations(model, stage=stage, sequence=sequence)
        if operations not in seen:
            seen[operations] = len(like)
            like.append(stage)
        alike.append(seen[operations])
    return StageTable(tuple(seen), tuple(like), tuple(alike))


def attention_side(
    model: ModelSpec, pool: Pool, network: Network, *, table: StageTable, sizes: AttentionSizes
) -> AttentionSide:
    """Costs of every A stage of ``model`` on the GPUs of ``pool``."""
    width, tokens = pool.gpu.bytes_per_number, sizes.tokens
    times = []
    kept = []
    for stage, operations in zip(table.like, table.operations, strict=True):
        total = sum((_operation_times(each, pool, model, sizes) for each in operations), _Times())
        overhead = Timer(pool.gpu).overhead
        total += _Times(forward=overhead, backward=2 * overhead)
        total += _tensor_parallel_times(model, pool, network, sizes, stage)
        times.append(total + _context_parallel_times(model, pool, network, sizes, operations))
        kept.append(stage_bytes(model, stage=stage, recompute=sizes.recompute, width=width) * tokens)
    index = np.array(table.alike)
    measured = pool.gpu.calibration
    times = [each.scaled(measured.attention, measured.attention * measured.backward) for each in times]
    whole = max(stage_bytes(model, stage=stage, recompute=Recompute.NONE, width=width) for stage in table.like)
    return AttentionSide(
        forward=np.array([each.forward for each in times])[index],
        backward=np.array([each.backward for each in times])[index],
        again=np.array([each.again for each in times])[index],
        weight=np.array([each.weight for each in times])[index],
        kept=np.array(kept)[index],
        workspace=whole * tokens,
        tail_workspace=logits_bytes(model, width=width) * tokens,
    )


def _operation_times(operation: Operation, pool: Pool, model: ModelSpec, sizes: AttentionSizes) -> _Times:
    timer = Timer(pool.gpu)
    amount = operation.amount * sizes.tokens
    weight = 0.0
    if operation.does is Does.GEMM:
        forward = float(timer.gemm(amount))
        backward, weight = operation.backward * forward, forward
    elif operation.does is Does.MEMORY:
        forward = float(timer.memory(amount * pool.gpu.bytes_per_number))
        backward = operation.backward * forward
    else:
        # A ring of context-parallel ranks attends block by block.
        block = max(1.0, sizes.sequence / sizes.context_parallel)
        head = model.attention.value_dim
        forward = float(timer.attention(amount, sequence=block, head_dim=head, backward=False))
        backward = float(timer.attention(amount * ATTENTION_BACKWARD, sequence=block, head_dim=head, backward=True))
    again = forward if operation.again <= sizes.recompute else 0.0
    return _Times(forward, backward + again, again, weight)


def _blocks(model: ModelSpec, stage: int) -> int:
    """Blocks of a stage that tensor parallelism gathers before and scatters after: attention, MLPs, shared experts."""
    dense = set(model.dense_layers)
    layers = model.stage_layers[stage]
    shared = bool(model.moe.shared_ffn_hidden_size)
    return sum(1 + (1 if layer in dense else shared) for layer in layers) + (stage == model.num_moe_layers)


def _tensor_parallel_times(
    model: ModelSpec, pool: Pool, network: Network, sizes: AttentionSizes, stage: int
) -> _Times:
    """Exposed all-gathers and reduce-scatters over NVLink: 2 a block forward, 3 backward (the input is gathered again).

    With sequence parallelism each moves (TP - 1) / TP of the block's activations (Korthikanti et al., section 4.2).
    """
    parallel = sizes.tensor_parallel
    if parallel == 1:
        return _Times()
    tokens = sizes.tokens_per_rank / sizes.context_parallel
    moved = tokens * model.hidden_size * pool.gpu.bytes_per_number * (parallel - 1) / parallel
    one = moved / _nvlink(pool) + network.local_latency_us * 1e-6
    blocks = _blocks(model, stage)
    again = 2 * blocks * one if sizes.recompute is Recompute.FULL and stage < model.num_moe_layers else 0.0
    return _Times(2 * blocks * one, 3 * blocks * one + again, again)


def _context_parallel_times(
    model: ModelSpec, pool: Pool, network: Network, sizes: AttentionSizes, operations: tuple[Operation, ...]
) -> _Times:
    """What of the ring of keys and values is longer than the attention it hides behind (Liu et al., arXiv 2310.01889).

    Forward passes K and V around, backward K, V and their gradients.
    """
    parallel = sizes.context_parallel
    if parallel == 1:
        return _Times()
    attention = model.attention
    heads = max(1.0, attention.num_query_groups / sizes.tensor_parallel)
    numbers = heads * (attention.key_dim + attention.value_dim) * sizes.tokens_per_rank / parallel
    hop = numbers * pool.gpu.bytes_per_number / _nvlink(pool) + network.local_latency_us * 1e-6
    forward = backward = again = 0.0
    for operation in operations:
        if operation.does is Does.CORE:
            core = _operation_times(operation, pool, model, sizes)
            hidden = (parallel - 1) / parallel
            exposed = max(0.0, (parallel - 1) * hop - hidden * core.forward)
            repeated = exposed if core.again else 0.0
            forward += exposed
            backward += max(0.0, 2 * (parallel - 1) * hop - hidden * (core.backward - core.again)) + repeated
            again += repeated
    return _Times(forward, backward, again)


def _nvlink(pool: Pool) -> float:
    """Bytes per second a GPU moves to its neighbours, one way."""
    return pool.nvlink_gb_per_s * 1e9 * pool.nvlink_efficiency
