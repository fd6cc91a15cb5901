"""What every stage needs and makes: the one place where the model's dataflow is written down.

Lowering, verifier, simulator and executor all read these tables, so that none of them can disagree
about which transfer belongs to which compute action.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_disagmoe.schedules.actions import Edge, Group, Kind, Placement, Schedule, Side

#: Kinds that use a group's compute stream (``D`` is authored among them but takes no time there).
COMPUTE = frozenset((Kind.F, Kind.B, Kind.I, Kind.W, Kind.D))
TRANSFER = frozenset((Kind.SEND, Kind.RECV))


class Port(NamedTuple):
    """One edge in one direction at one layer: an input or an output of a stage, for any micro-batch."""

    edge: Edge
    gradient: bool
    layer: int


class Channel(NamedTuple):
    """Where order matters: transfers of one kind and direction between one pair of groups are first in, first out."""

    edge: Edge
    gradient: bool
    sender: Group
    receiver: Group

    def __str__(self) -> str:
        return f"{'d' if self.gradient else ''}{self.edge.value} {self.sender}->{self.receiver}"


def inputs(side: Side, kind: Kind, layer: int, *, num_layers: int, again: bool = False) -> tuple[Port, ...]:
    """What ``kind`` of stage ``layer`` waits for, local lanes included, in the order it is received.

    ``again`` says that this stage of this micro-batch is re-dispatched. ``W`` and ``D`` wait for nothing from outside
    their group.
    """
    if kind is Kind.F:
        if side is Side.F:
            return (Port(Edge.M2N, False, layer),)
        return (Port(Edge.N2M, False, layer - 1), Port(Edge.LANE, False, layer - 1)) if layer > 0 else ()
    if kind in (Kind.B, Kind.I):
        if side is Side.F:
            gradient = (Port(Edge.N2M, True, layer),)
            return (Port(Edge.AGAIN, False, layer), *gradient) if again else gradient
        return (Port(Edge.M2N, True, layer), Port(Edge.LANE, True, layer)) if layer < num_layers else ()
    return ()


def outputs(side: Side, kind: Kind, layer: int, *, num_layers: int) -> tuple[Port, ...]:
    """What ``kind`` of stage ``layer`` makes for others, local lanes included, in the order it is sent."""
    if kind is Kind.F:
        if side is Side.F:
            return (Port(Edge.N2M, False, layer),)
        return (Port(Edge.M2N, False, layer), Port(Edge.LANE, False, layer)) if layer < num_layers else ()
    if kind in (Kind.B, Kind.I):
        if side is Side.F:
            return (Port(Edge.M2N, True, layer),)
        return (Port(Edge.N2M, True, layer - 1), Port(Edge.LANE, True, layer - 1)) if layer > 0 else ()
    if kind is Kind.D and side is Side.A and layer < num_layers:
        return (Port(Edge.AGAIN, False, layer),)
    return ()


def channel_of(placement: Placement, port: Port) -> Channel:
    """The channel that carries ``port``; sender and receiver are equal for a local hand-over."""
    return Channel(port.edge, port.gradient, *placement.ends(port.edge, port.layer, gradient=port.gradient))


def redispatched(schedule: Schedule) -> frozenset[tuple[int, int]]:
    """The ``(layer, micro_batch)`` of every FFN stage whose input is dropped after forward and sent again."""
    return frozenset(
        (action.layer, action.micro_batch)
        for group, actions in schedule.actions.items()
        if group.side is Side.A
        for action in actions
        if action.kind is Kind.D
    )
