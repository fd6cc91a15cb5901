"""Compute-only schedules as flat arrays: what builders and the simulator work on.

Stages are numbered along the model: A(i) is 2i, F(i) is 2i + 1, the tail is 2L. Groups are numbered attention first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_disagmoe.schedules.actions import Action, Edge, Kind, Placement, Schedule, Side
from megatron_disagmoe.schedules.lowering import lowered

Ints = NDArray[np.int64]

#: Codes of the kinds in ``Orders.kind``.
F, B, I, W, D = range(5)
KINDS = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.D)
# Enum members hash in Python code; their identity hashes in C, five times as fast.
_SEND, _RECV = -1, -2
_CODE_OF_ID = {**{id(kind): code for code, kind in enumerate(KINDS)}, id(Kind.SEND): _SEND, id(Kind.RECV): _RECV}


def group_of_stage(placement: Placement) -> Ints:
    """Number of the group of every stage."""
    groups = np.empty(2 * placement.num_layers + 1, np.int64)
    groups[0::2] = placement.attention
    groups[1::2] = np.array(placement.ffn) + placement.num_attention_groups
    return groups


@dataclass(frozen=True)
class LateSends:
    """Messages that are not sent as soon as they are made, in the order in which each group sends them.

    All arrays have one entry a message. ``maker``: position of the compute action that makes it. ``stride``: stages
    from there to its user, 2 for a lane. ``after``: position of the last compute action before its SEND.
    """

    maker: Ints
    stride: Ints
    after: Ints

    def __len__(self) -> int:
        return len(self.maker)


@dataclass(frozen=True)
class PortOrders:
    """The order in which ports serve messages; what is not here they serve as it comes.

    All arrays have one entry a message. ``maker``: position of the compute action that makes it. ``sent``,
    ``received``: a number that grows along the SENDs of its sender, and along the RECVs of its receiver.
    """

    maker: Ints
    sent: Ints
    received: Ints


@dataclass(frozen=True)
class Orders:
    """The compute actions of all groups, one group after the other: group g's are ``bounds[g]:bounds[g + 1]``.

    Every message is sent when it is made, but for those in ``late``. Ports serve messages as they come, but for those
    in ``ports``.
    """

    placement: Placement
    num_micro_batches: int
    forward_only: bool
    kind: Ints
    stage: Ints
    micro_batch: Ints
    bounds: Ints
    late: LateSends | None = None
    ports: PortOrders | None = None

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def group(self) -> Ints:
        """Group of every action."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    def position(self, *kinds: int) -> Ints:
        """Position of the action of one of ``kinds`` for each stage and micro-batch (stage * n + it), -1 for none."""
        table = np.full((2 * self.placement.num_layers + 1) * self.num_micro_batches, -1, np.int64)
        at = np.flatnonzero(np.isin(self.kind, kinds))
        table[self.stage[at] * self.num_micro_batches + self.micro_batch[at]] = at
        return table

    @classmethod
    def of(cls, schedule: Schedule) -> Orders:
        """The compute actions of ``schedule``, and of its transfers what is sent late and what ports serve in order."""
        if schedule.ports_in_order:
            schedule = lowered(schedule)
        columns: list[list[Ints]] = [[], [], []]
        lengths = [0]
        sends = _Sends()
        for group in schedule.placement.groups:
            actions = schedule.actions.get(group, ())
            kinds, layers, micro_batches, edges, gradients = zip(*actions, strict=True) if actions else ((),) * 5
            kind = np.fromiter(map(_CODE_OF_ID.__getitem__, map(id, kinds)), np.int64, len(actions))
            compute = kind >= 0
            if (kind == _SEND).any():
                sends.add(kind, layers, micro_batches, edges, gradients, start=sum(lengths))
            lengths.append(int(np.count_nonzero(compute)))
            stage = 2 * np.array(layers, np.int64) + (group.side is Side.F)
            for column, values in zip(columns, (kind, stage, np.array(micro_batches, np.int64)), strict=True):
                column.append(values[compute])
        kind, stage, micro_batch = (np.concatenate(column) for column in columns)
        orders = cls(
            placement=schedule.placement,
            num_micro_batches=schedule.num_micro_batches,
            forward_only=schedule.forward_only,
            kind=kind,
            stage=stage,
            micro_batch=micro_batch,
            bounds=np.cumsum(lengths),
        )
        ports = _port_orders(schedule, orders) if schedule.ports_in_order else None
        return dataclasses.replace(orders, late=sends.late(orders), ports=ports)

    def schedule(self, parameters: dict[str, object]) -> Schedule:
        """The same as a schedule; ``parameters`` are what its builder was given.

        Orders of ``ports`` need SENDs and RECVs, which are left out here (``builders.listed`` writes them).
        """
        assert self.ports is None, "orders of ports are written with the transfers"
        actions = [
            Action(KINDS[kind], stage >> 1, micro_batch)
            for kind, stage, micro_batch in zip(
                self.kind.tolist(), self.stage.tolist(), self.micro_batch.tolist(), strict=True
            )
        ]
        bounds = self.bounds
        if self.late is not None and len(self.late):
            inserted = np.searchsorted(np.sort(self.late.after), self.bounds)  # sends before each group's first action
            bounds = self.bounds + inserted
            actions = self._with_late_sends(actions, self.late)
        return Schedule(
            placement=self.placement,
            num_micro_batches=self.num_micro_batches,
            forward_only=self.forward_only,
            actions={
                group: tuple(actions[bounds[number] : bounds[number + 1]])
                for number, group in enumerate(self.placement.groups)
            },
            parameters=parameters,
        )

    def _with_late_sends(self, actions: list[Action], late: LateSends) -> list[Action]:
        sends: dict[int, list[Action]] = {}
        for maker, stride, after in zip(late.maker.tolist(), late.stride.tolist(), late.after.tolist(), strict=True):
            kind, stage = int(self.kind[maker]), int(self.stage[maker])
            gradient = kind in (B, I)
            first = stage - stride if gradient else stage
            edge = Edge.AGAIN if kind == D else Edge.LANE if stride == 2 else (Edge.M2N, Edge.N2M)[first % 2]
            send = Action(Kind.SEND, first >> 1, int(self.micro_batch[maker]), edge, gradient)
            sends.setdefault(after, []).append(send)
        return [each for at, action in enumerate(actions) for each in (action, *sends.get(at, ()))]


class _Sends:
    """The SENDs of a schedule, group after group, and which of them are late."""

    def __init__(self) -> None:
        self._columns: list[list[NDArray[Any]]] = [[] for _ in range(6)]

    def add(
        self,
        kind: Ints,
        layers: Sequence[int],
        micro_batches: Sequence[int],
        edges: Sequence[Edge | None],
        gradients: Sequence[bool],
        *,
        start: int,
    ) -> None:
        """One group's list, column by column; its compute actions are numbered from ``start``."""
        at = np.flatnonzero(kind == _SEND)
        number = start + np.cumsum(kind >= 0) - 1
        edge = [_EDGE_OF_ID.get(id(edges[index]), -1) for index in at.tolist()]
        values = (np.array(layers), np.array(micro_batches), np.array(gradients), number)
        first = np.full(len(at), start)
        for column, value in zip(self._columns, (np.array(edge), *(each[at] for each in values), first), strict=True):
            column.append(value)

    def late(self, orders: Orders) -> LateSends | None:
        """What is sent later than right after its maker, or after something that is; None where nothing is."""
        if not self._columns[0]:
            return None
        edge, layer, micro_batch, gradient, after, start = (np.concatenate(column) for column in self._columns)
        n, stages = orders.num_micro_batches, 2 * orders.placement.num_layers + 1
        stage = 2 * layer + (edge == _N2M) * ~gradient + gradient * np.where(edge == _M2N, 1, 2)
        possible = (edge >= 0) & (micro_batch >= 0) & (micro_batch < n) & (stage >= 0) & (stage < stages)
        key = np.where(possible, stage * n + micro_batch, 0)
        made = np.where(gradient, orders.position(B, I)[key], orders.position(F)[key])
        made = np.where(edge == _AGAIN, orders.position(D)[key], made)
        possible &= (made >= start) & (made <= after)
        made, after, edge = made[possible], after[possible], edge[possible]
        apart = np.where(made < after, np.arange(len(made)), -1)
        last = np.maximum.accumulate(apart)
        late = (last >= 0) & (after[last] == after)
        if not late.any():
            return None
        return LateSends(made[late], np.where(edge[late] == _LANE, 2, 1), after[late])


_EDGE_OF_ID = {id(edge): code for code, edge in enumerate(Edge)}
_M2N, _N2M, _LANE, _AGAIN = (tuple(Edge).index(edge) for edge in (Edge.M2N, Edge.N2M, Edge.LANE, Edge.AGAIN))


def _port_orders(schedule: Schedule, orders: Orders) -> PortOrders:
    """What the lists say of every message with both ends, lanes aside."""
    n = orders.num_micro_batches
    sent: dict[Action, int] = {}
    received: dict[Action, int] = {}
    for actions in schedule.actions.values():
        for action in actions:
            if action.edge is not Edge.LANE and action.kind in (Kind.SEND, Kind.RECV):
                turns = sent if action.kind is Kind.SEND else received
                turns.setdefault(action._replace(kind=Kind.SEND), len(turns))
    forward, backward, again = (orders.position(*kinds) for kinds in ((F,), (B, I), (D,)))
    rows = []
    for action, turn in sent.items():
        _, layer, micro_batch, edge, gradient = action
        stage = 2 * layer + (edge is Edge.N2M)
        table, made = (backward, stage + 1) if gradient else (again if edge is Edge.AGAIN else forward, stage)
        if action in received and 0 <= made * n + micro_batch < len(table) and table[made * n + micro_batch] >= 0:
            rows.append((table[made * n + micro_batch], turn, received[action]))
    return PortOrders(*np.array(rows, np.int64).reshape(-1, 3).T)


def in_micro_batch_order(orders: Orders) -> Orders:
    """The same slots, with every stage running its micro-batches in order, forward and backward.

    Micro-batches are alike, so a builder may hand them out as it likes; but gradients are summed in the order of the
    backwards, and one order everywhere makes every schedule give the same bits. Nothing waits longer for it: where
    every micro-batch comes to a stage after the stage before, the k-th of the one comes after the k-th of the other.

    ``orders`` has no ``D``, no late sends and no orders of ports, and a stage's backwards are all whole or all split.
    """
    assert not (orders.kind == D).any(), "a repeated dispatch belongs to one micro-batch"
    assert orders.late is None, "a late send belongs to one micro-batch"
    assert orders.ports is None, "so does a message whose turn it is"
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
