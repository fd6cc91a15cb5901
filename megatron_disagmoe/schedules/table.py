"""A schedule as flat arrays of integers, so that what lowering and verifier do is mostly a few array operations."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Schedule, Side

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

KINDS = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.D, Kind.SEND, Kind.RECV)
CODE = {kind: code for code, kind in enumerate(KINDS)}
F, B, I, W, D, SEND, RECV = range(len(KINDS))
EDGES = tuple(Edge)

# Enum members hash in Python code; their identity hashes in C, five times as fast.
_KIND_CODE = {id(kind): code for kind, code in CODE.items()}
_EDGE_CODE = {id(None): -1, **{id(edge): code for code, edge in enumerate(EDGES)}}


class Place(NamedTuple):
    """One action of a schedule: its group and its position in that group's list."""

    group: Group
    index: int  # type: ignore[assignment]  # shadows tuple.index, which no place needs


class Table:
    """All actions of a schedule, group after group; a *node* is an index into these arrays.

    Rows number the stages: A(0) .. A(L), then F(0) .. F(L-1); ``stage = row * num_micro_batches + micro_batch``.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        placement = schedule.placement
        self.groups: tuple[Group, ...] = placement.groups
        self.num_layers, self.num_micro_batches = placement.num_layers, schedule.num_micro_batches
        lists = [schedule.actions.get(group, ()) for group in self.groups]
        self.starts = np.concatenate(([0], np.cumsum([len(actions) for actions in lists]))).astype(np.int64)
        self.num_nodes = int(self.starts[-1])
        columns: list[list[npt.NDArray[Any]]] = [[], [], [], [], []]
        for actions in lists:
            if actions:
                kind, layer, micro_batch, edge, gradient = zip(*actions, strict=True)
                for column, values in zip(
                    columns,
                    (
                        np.fromiter(map(_KIND_CODE.__getitem__, map(id, kind)), np.int64, len(actions)),
                        np.array(layer, np.int64),
                        np.array(micro_batch, np.int64),
                        np.fromiter(map(_EDGE_CODE.__getitem__, map(id, edge)), np.int64, len(actions)),
                        np.array(gradient, np.bool_),
                    ),
                    strict=True,
                ):
                    column.append(values)
        empty = np.zeros(0, np.int64)
        self.kind, self.layer, self.micro_batch, self.edge, gradients = (
            np.concatenate(column) if column else empty for column in columns
        )
        self.gradient: Bools = gradients.astype(np.bool_)
        self.group: Ints = np.repeat(np.arange(len(self.groups)), np.diff(self.starts))
        self.on_attention: Bools = self.group < placement.num_attention_groups

    @property
    def num_stages(self) -> int:
        """Stages times micro-batches."""
        return (2 * self.num_layers + 1) * self.num_micro_batches

    @cached_property
    def group_of_row(self) -> Ints:
        """Number of the group that holds each row."""
        placement = self.schedule.placement
        ffn = [placement.num_attention_groups + index for index in placement.ffn]
        return np.array([*placement.attention, *ffn], np.int64)

    def row(self, side: Side, layer: int) -> int:
        """Row of A(layer) or F(layer)."""
        return layer if side is Side.A else self.num_layers + 1 + layer

    def stage_of_row(self, row: int) -> tuple[Side, int]:
        """Side and layer of a row."""
        return (Side.A, row) if row <= self.num_layers else (Side.F, row - self.num_layers - 1)

    def place(self, node: int) -> Place:
        """Where a node stands."""
        group = int(self.group[node])
        return Place(self.groups[group], node - int(self.starts[group]))

    def action(self, node: int) -> Action:
        """The action of a node."""
        place = self.place(node)
        return self.schedule.actions[place.group][place.index]

    def first_nodes(self, nodes: Ints, keys: Ints, size: int) -> Ints:
        """For each key the first of ``nodes`` that has it, -1 for none; ``keys`` runs beside ``nodes``."""
        result = np.full(size, -1, np.int64)
        result[keys[::-1]] = nodes[::-1]  # of several with one key the last assignment, the first node, stays
        return result
