"""The ports of a schedule as numbers: which channel each belongs to, which actions stand at its ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.schedules.actions import Kind, Side
from megatron_disagmoe.schedules.dataflow import Channel, Port, channel_of, inputs, outputs
from megatron_disagmoe.schedules.table import EDGES, Ints, Table

#: Gives, for F, B (or I) and D, the node of every stage's action, -1 for none.
NodesOfKind = Callable[[Kind], Ints]


@dataclass(frozen=True)
class Ports:
    """For each port number (edge, direction, layer): its channel and the actions at its ends; -1 where it is none."""

    channels: tuple[Channel, ...]
    channel: Ints
    sender: Ints
    receiver: Ints
    maker: tuple[tuple[Kind, int] | None, ...]  # kind and row of the action that makes the data
    user: tuple[tuple[Kind, int] | None, ...]
    slot: Ints  # which of its user's inputs it is
    num_micro_batches: int

    def makers(self, nodes: NodesOfKind) -> Ints:
        """For every item (``port * num_micro_batches + micro_batch``) the node that makes it, -1 for none."""
        return self._ends(self.maker, nodes)

    def users(self, nodes: NodesOfKind) -> Ints:
        """For every item the node that uses it, -1 for none."""
        return self._ends(self.user, nodes)

    def _ends(self, ends: tuple[tuple[Kind, int] | None, ...], nodes: NodesOfKind) -> Ints:
        n = self.num_micro_batches
        result = np.full(len(ends) * n, -1, np.int64)
        for port, end in enumerate(ends):
            if end is not None:
                kind, row = end
                result[port * n : (port + 1) * n] = nodes(kind)[row * n : (row + 1) * n]
        return result


def _number(port: Port, num_layers: int) -> int:
    return (EDGES.index(port.edge) * 2 + port.gradient) * num_layers + port.layer


def ports_of(table: Table) -> Ports:
    """The ports of a table's schedule; local lanes have no channel."""
    placement, layers = table.schedule.placement, table.num_layers
    size = len(EDGES) * 2 * layers
    channels: dict[Channel, int] = {}
    group_number = {group: number for number, group in enumerate(table.groups)}
    channel, sender, receiver, slot = (np.full(size, -1, np.int64) for _ in range(4))
    maker: list[tuple[Kind, int] | None] = [None] * size
    user: list[tuple[Kind, int] | None] = [None] * size
    kinds = (Kind.F,) if table.schedule.forward_only else (Kind.F, Kind.B, Kind.D)
    stages = [(Side.A, layer) for layer in range(layers + 1)] + [(Side.F, layer) for layer in range(layers)]
    for row, (side, layer) in enumerate(stages):
        for kind in kinds:
            for port in outputs(side, kind, layer, num_layers=layers):
                if placement.is_local(port.edge, port.layer):
                    continue
                number, its_channel = _number(port, layers), channel_of(placement, port)
                channel[number] = channels.setdefault(its_channel, len(channels))
                sender[number] = group_number[its_channel.sender]
                receiver[number] = group_number[its_channel.receiver]
                maker[number] = kind, row
            for position, port in enumerate(inputs(side, kind, layer, num_layers=layers, again=True)):
                user[_number(port, layers)] = kind, row
                slot[_number(port, layers)] = position
    return Ports(tuple(channels), channel, sender, receiver, tuple(maker), tuple(user), slot, table.num_micro_batches)
