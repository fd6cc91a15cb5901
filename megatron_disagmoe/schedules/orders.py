"""Compute-only schedules as flat arrays: what builders and the simulator work on.

Stages are numbered along the model: A(i) is 2i, F(i) is 2i + 1, the tail is 2L. Groups are numbered attention first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_disagmoe.schedules.actions import Action, Kind, Placement, Schedule, Side

Ints = NDArray[np.int64]

#: Codes of the kinds in ``Orders.kind``.
F, B, I, W, D = range(5)
KINDS = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.D)
# Enum members hash in Python code; their identity hashes in C, five times as fast.
_CODE_OF_ID = {id(kind): KINDS.index(kind) if kind in KINDS else -1 for kind in Kind}


def group_of_stage(placement: Placement) -> Ints:
    """Number of the group of every stage."""
    groups = np.empty(2 * placement.num_layers + 1, np.int64)
    groups[0::2] = placement.attention
    groups[1::2] = np.array(placement.ffn) + placement.num_attention_groups
    return groups


@dataclass(frozen=True)
class Orders:
    """The compute actions of all groups, one group after the other: group g's are ``bounds[g]:bounds[g + 1]``."""

    placement: Placement
    num_micro_batches: int
    forward_only: bool
    kind: Ints
    stage: Ints
    micro_batch: Ints
    bounds: Ints

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def group(self) -> Ints:
        """Group of every action."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    @classmethod
    def of(cls, schedule: Schedule) -> Orders:
        """The compute actions of ``schedule``, transfers left out."""
        columns: list[list[Ints]] = [[], [], []]
        lengths = [0]
        for group in schedule.placement.groups:
            actions = schedule.actions.get(group, ())
            kinds, layers, micro_batches, *_ = zip(*actions, strict=True) if actions else ((), (), ())
            kind = np.fromiter(map(_CODE_OF_ID.__getitem__, map(id, kinds)), np.int64, len(actions))
            compute = kind >= 0
            lengths.append(int(np.count_nonzero(compute)))
            stage = 2 * np.array(layers, np.int64) + (group.side is Side.F)
            for column, values in zip(columns, (kind, stage, np.array(micro_batches, np.int64)), strict=True):
                column.append(values[compute])
        kind, stage, micro_batch = (np.concatenate(column) for column in columns)
        return cls(
            placement=schedule.placement,
            num_micro_batches=schedule.num_micro_batches,
            forward_only=schedule.forward_only,
            kind=kind,
            stage=stage,
            micro_batch=micro_batch,
            bounds=np.cumsum(lengths),
        )

    def schedule(self, parameters: dict[str, object]) -> Schedule:
        """The same as a schedule; ``parameters`` are what its builder was given."""
        actions = [
            Action(KINDS[kind], stage >> 1, micro_batch)
            for kind, stage, micro_batch in zip(
                self.kind.tolist(), self.stage.tolist(), self.micro_batch.tolist(), strict=True
            )
        ]
        return Schedule(
            placement=self.placement,
            num_micro_batches=self.num_micro_batches,
            forward_only=self.forward_only,
            actions={
                group: tuple(actions[self.bounds[number] : self.bounds[number + 1]])
                for number, group in enumerate(self.placement.groups)
            },
            parameters=parameters,
        )


def in_micro_batch_order(orders: Orders) -> Orders:
    """The same slots, with every stage running its micro-batches in order, forward and backward.

    Micro-batches are alike, so a builder may hand them out as it likes; but gradients are summed in the order of the
    backwards, and one order everywhere makes every schedule give the same bits. Nothing waits longer for it: where
    every micro-batch comes to a stage after the stage before, the k-th of the one comes after the k-th of the other.

    ``orders`` has no ``D``, and a stage's backwards are all whole or all split.
    """
    assert not (orders.kind == D).any(), "a repeated dispatch belongs to one micro-batch"
    micro_batch = orders.micro_batch.copy()
    slots = np.lexsort((np.arange(len(orders)), orders.stage, orders.kind))
    micro_batch[slots] = orders.micro_batch[np.lexsort((orders.micro_batch, orders.stage, orders.kind))]
    return dataclasses.replace(orders, micro_batch=micro_batch)


def sorted_orders(
    placement: Placement,
    *,
    num_micro_batches: int,
    forward_only: bool,
    kind: Ints,
    stage: Ints,
    micro_batch: Ints,
    keys: tuple[NDArray[np.generic], ...],
) -> Orders:
    """Orders from actions in any order: each group runs its own by ``keys``, the first of them first."""
    group = group_of_stage(placement)[stage]
    order = np.lexsort((*reversed(keys), group))
    counts = np.bincount(group, minlength=len(placement.groups))
    return Orders(
        placement=placement,
        num_micro_batches=num_micro_batches,
        forward_only=forward_only,
        kind=kind[order],
        stage=stage[order],
        micro_batch=micro_batch[order],
        bounds=np.concatenate(([0], np.cumsum(counts))),
    )
