"""Bytes a parameter costs beside its activations, and how many parameters a GPU of each group holds.

Each level says what it is made of and which Megatron flags give it. ``--use-precision-aware-optimizer`` keeps, of a
master weight, the 16 bits that the bf16 weight lacks (Transformer Engine's parameter remainders): 2 bytes, no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.planner.arrays import Floats
from megatron_disagmoe.planner.model_spec import ModelSpec


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter. The distributed optimizer shares ``master``, ``first`` and ``second`` out over its ranks."""

    weight: int
    gradient: int
    master: int
    first: int
    second: int
    flags: tuple[str, ...]
    why: str

    @property
    def total(self) -> int:
        """The number that names the level."""
        return self.weight + self.gradient + self.optimizer

    @property
    def optimizer(self) -> int:
        return self.master + self.first + self.second


_AWARE = ("--use-precision-aware-optimizer",)
_BF16_MEAN = ("--exp-avg-dtype", "bf16")
_BF16_MOMENTS = (*_BF16_MEAN, "--exp-avg-sq-dtype", "bf16")
_FP8_MOMENTS = ("--exp-avg-dtype", "fp8", "--exp-avg-sq-dtype", "fp8")
_BF16_GRADIENTS = ("--main-grads-dtype", "bf16", "--grad-reduce-in-bf16")
_BF16_LEVELS = (
    StateBytes(2, 4, 4, 4, 4, (), "bf16 weights; gradients, master weights and both Adam moments in fp32"),
    StateBytes(2, 4, 2, 4, 4, _AWARE, "as 18, of master weights only the 16 bits that the weights lack"),
    StateBytes(2, 4, 2, 2, 4, (*_AWARE, *_BF16_MEAN), "as 16, the first moment in bf16"),
    StateBytes(
        2, 4, 2, 2, 2, (*_AWARE, *_BF16_MOMENTS), "as 16, both moments in bf16 (arXiv 2412.19437, section 3.3.2)"
    ),
    StateBytes(
        2, 2, 2, 1, 1, (*_AWARE, *_FP8_MOMENTS, *_BF16_GRADIENTS), "as 16, gradients in bf16 and both moments in fp8"
    ),
)
_FP32_LEVELS = (StateBytes(4, 4, 0, 4, 4, (), "fp32 weights, gradients and both Adam moments; no master weights"),)


def state_levels(dtype: str) -> tuple[StateBytes, ...]:
    """Every level for training in ``dtype``, the most exact first."""
    return {"bf16": _BF16_LEVELS, "fp32": _FP32_LEVELS}[dtype]


def state_level(dtype: str, total: int) -> StateBytes:
    """The level of ``total`` bytes a parameter.

    Raises:
        ValueError: there is none.
    """
    levels = state_levels(dtype)
    for level in levels:
        if level.total == total:
            return level
    known = ", ".join(str(level.total) for level in levels)
    raise ValueError(f"--bytes-per-parameter {total} is not known for {dtype}: choose from {known}")


@dataclass(frozen=True)
class AttentionParameters:
    """Parameters of every A stage. ``cut`` are divided by tensor parallelism, ``whole`` are on each of its ranks."""

    cut: Floats
    whole: Floats
    embedding: float
    output: float
    final_norm: float
    tied: bool

    def of_groups(self, num_groups: int, *, tensor_parallel: int) -> Floats:
        """Parameters on one GPU of each group, A(i) on group i mod ``num_groups``."""
        return self.of_placement((np.arange(len(self.cut)) % num_groups).tolist(), tensor_parallel=tensor_parallel)

    def of_placement(self, groups: Sequence[int], *, tensor_parallel: int) -> Floats:
        """The same for stages on ``groups``, the tail's last. A(0) is on group 0."""
        total = np.bincount(groups, self.cut / tensor_parallel + self.whole)
        total[0] += self.embedding / tensor_parallel
        tail = groups[-1]
        total[tail] += self.final_norm
        if tail or not self.tied:  # tied and elsewhere: a copy
            total[tail] += self.output / tensor_parallel
        return total


def attention_parameters(model: ModelSpec) -> AttentionParameters:
    """What the A side holds."""
    stages = range(model.num_moe_layers + 1)
    whole = [_uncut_parameters(model, stage) for stage in stages]
    every = [model.num_stage_parameters(stage) for stage in stages]
    return AttentionParameters(
        cut=np.array(every, dtype=np.float64) - np.array(whole),
        whole=np.array(whole, dtype=np.float64),
        embedding=model.num_embedding_parameters,
        output=model.vocab_size * model.hidden_size,
        final_norm=model.num_norm_parameters(),
        tied=model.tied_embeddings,
    )


def _uncut_parameters(model: ModelSpec, stage: int) -> int:
    """Norms and router, which every tensor-parallel rank holds."""
    norms = 2 * len(model.stage_layers[stage]) * model.num_norm_parameters()
    moe = model.moe
    router = moe.num_experts * (model.hidden_size + moe.router_bias) + model.hidden_size * moe.shared_gate
    return norms + router * (stage < model.num_moe_layers)
