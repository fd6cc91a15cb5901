"""Topology -> process groups, registered in Megatron's own parallel state.

Every group of the topology is a little Megatron world of its own: ``initialize_model_parallel`` is run once
per block, on every rank and in the same order (``new_group`` is collective), and each rank keeps the globals
of its own block. So on each rank ``mpu`` shows the groups of its role, with ``PP = 1``, and Megatron's loop,
optimizer, data loaders, logging and checkpoints work on them unchanged. On FFN ranks the data-parallel size
and rank *numbers* are the attention side's: batches and samples are counted there.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_disagmoe.schedules.actions import Side
from megatron_disagmoe.topology import Role, Topology


@dataclass(frozen=True)
class AFParallelState:
    """This rank's place, and the process groups that Megatron has no name for.

    Attributes:
        topology: of the whole world.
        role: of this rank.
        world_size: of the job.
        column_group: the attention ranks that see this one's batches; None on FFN ranks, and where p_A = 1.
    """

    topology: Topology
    role: Role
    world_size: int
    column_group: dist.ProcessGroup | None = None

    @property
    def is_attention(self) -> bool:
        """Whether this rank holds attention."""
        return self.role.group.side is Side.A

    @property
    def is_tail(self) -> bool:
        """Whether this rank holds the output layer and the loss."""
        return self.role.group == self.topology.placement.tail_group

    @property
    def is_first(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.role.group == self.topology.placement.attention_group(0)

    @property
    def speaks_for_group(self) -> bool:
        """True on one rank of each group: it contributes what all ranks of the group agree on."""
        return self.role.replica == 0 and self.role.index == 0


_STATE: AFParallelState | None = None


def state() -> AFParallelState:
    """This rank's AF-pipe state; only after ``initialize``."""
    assert _STATE is not None, "the AF-pipe parallel state is not initialised"
    return _STATE


def is_initialized() -> bool:
    """Whether this process is part of an AF-pipe."""
    return _STATE is not None


def initialize(
    topology: Topology, *, initialize_model_parallel: Callable[..., None], tied_embeddings: bool, **megatron: Any
) -> AFParallelState:
    """Build every block's groups with Megatron's own ``initialize_model_parallel`` and keep this rank's.

    Args:
        topology: of the whole world.
        initialize_model_parallel: Megatron's function (not a wrapper of it).
        tied_embeddings: whether input embedding and output layer share one weight.
        **megatron: arguments that do not depend on the role (timeouts, NCCL options, ...).
    """
    global _STATE
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert world_size == topology.world_size, f"{world_size} processes for a topology of {topology.world_size}"
    role = topology.role(rank)
    pristine = _globals()
    mine: dict[str, Any] = {}
    for group in topology.group_order:
        _restore(pristine)
        block = topology.blocks[group]
        initialize_model_parallel(
            **megatron,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            context_parallel_size=1,
            expert_model_parallel_size=topology.ffn_ranks if group.side is Side.F else 1,
            expert_tensor_parallel_size=1,
            rank_offset=block.start,
            local_world_size=len(block),
            get_embedding_ranks=lambda ranks: [ranks[0]],
            get_position_embedding_ranks=lambda ranks: [ranks[0]],
        )
        if group == role.group:
            mine = _globals()
    _restore(mine)
    minutes = megatron.get("distributed_timeout_minutes")
    timeout = None if minutes is None else timedelta(minutes=minutes)
    if tied_embeddings:
        _tie_embedding_groups(topology, rank, timeout)
    if role.group.side is Side.F:
        mpu._MPU_DATA_PARALLEL_WORLD_SIZE = topology.data_parallel_size
        mpu._MPU_DATA_PARALLEL_RANK = 0
    column = _column_group(topology, rank, timeout)
    _STATE = AFParallelState(topology=topology, role=role, world_size=world_size, column_group=column)
    return _STATE


def _column_group(topology: Topology, rank: int, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """The group of this rank's column, if there is one to speak of; every rank makes all of them."""
    mine = None
    if topology.placement.num_attention_groups > 1:
        for ranks in topology.columns:
            group = dist.new_group(sorted(ranks), timeout=timeout)
            if rank in ranks:
                mine = group
    return mine


def _tie_embedding_groups(topology: Topology, rank: int, timeout: timedelta | None) -> None:
    """Where A_0 is not the tail, the two copies of the tied weight sum their gradients over a group of their own."""
    first, tail = topology.placement.attention_group(0), topology.placement.tail_group
    if first == tail:
        return
    for replica in range(topology.replicas):
        for ranks in zip(topology.ranks(first, replica), topology.ranks(tail, replica), strict=True):
            group = dist.new_group(sorted(ranks), timeout=timeout)
            if rank in ranks:
                mpu._EMBEDDING_GROUP = group
                mpu._EMBEDDING_GLOBAL_RANKS = sorted(ranks)


_NAMES = re.compile(r"_[A-Z]|_global_process_group_list$")


def _globals() -> dict[str, Any]:
    return {name: _own(value) for name, value in vars(mpu).items() if _NAMES.match(name)}


def _restore(values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(mpu, name, _own(value))


def _own(value: Any) -> Any:
    """A copy where Megatron changes the value in place (lists of ranks, of groups)."""
    return copy.copy(value) if isinstance(value, list | dict) else value
