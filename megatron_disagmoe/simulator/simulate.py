"""When everything in a schedule happens: its compute in the given order, its transfers over full-duplex ports.

Each group has one sending and one receiving port. A transfer holds the sender's out port and the receiver's in port for
as long as it takes; activations, gradients and repeated dispatches contend for them, first come, first served. A
message comes when its sender sends it: as soon as it is made, or where the schedule has its SEND later, there. Where
a schedule has its ports in order, a port waits for the message whose turn it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Schedule
from megatron_disagmoe.schedules.orders import KINDS, B, D, F, I, Ints, LateSends, Orders, W, group_of_stage
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.engine import Floats, Tasks, run
from megatron_disagmoe.simulator.timeline import Span, Timeline


@dataclass(frozen=True)
class Transfers:
    """The transfers that some orders make. All arrays have one entry a transfer.

    ``maker`` and ``user``: positions of the compute actions before and after it, ``user`` -1 where nobody needs it.
    ``after``: position of the compute action after which it is sent; its maker, unless it is sent late.
    ``first_stage``: the stage its edge leaves in forward; ``stride``: 1 for M2N and N2M, 2 for a lane.
    """

    maker: Ints
    after: Ints
    user: Ints
    sender: Ints
    receiver: Ints
    first_stage: Ints
    stride: Ints
    duration: Floats

    def __len__(self) -> int:
        return len(self.maker)


@dataclass(frozen=True)
class Run:
    """A simulated run: start and end of every action of ``orders`` and of every one of its ``transfers``."""

    orders: Orders
    transfers: Transfers
    start: Floats
    end: Floats
    transfer_start: Floats
    transfer_end: Floats

    @property
    def makespan(self) -> float:
        """When the last compute action ended."""
        return float(self.end.max(initial=0.0))


def durations(orders: Orders, costs: StageCosts) -> Floats:
    """Time of every compute action."""
    layers = orders.placement.num_layers
    table = np.zeros((5, 2 * layers + 1))
    for stage in range(2 * layers + 1):
        table[F, stage] = costs.forward(stage, num_layers=layers)
        table[I, stage] = costs.input_gradient(stage, num_layers=layers)
        table[W, stage] = costs.weight_gradient(stage, num_layers=layers)
    table[B] = table[I] + table[W]
    result: Floats = table[orders.kind, orders.stage]
    again = np.flatnonzero(orders.kind == D)
    if len(again):
        stages = orders.stage[again] + 1
        users = orders.position(B, I)[stages * orders.num_micro_batches + orders.micro_batch[again]]
        more = np.array([costs.dispatched_again(stage, num_layers=layers) for stage in stages.tolist()])
        result[users[users >= 0]] += more[users >= 0]
    return result


def transfers_of(orders: Orders, costs: StageCosts) -> Transfers:
    """Every transfer between two groups that costs time or port; lanes only where ``costs.lane`` is not 0."""
    n, last = orders.num_micro_batches, 2 * orders.placement.num_layers
    groups = group_of_stage(orders.placement)
    forward, backward = orders.position(F), orders.position(B, I)
    is_forward = orders.kind == F
    is_gradient = (orders.kind == B) | (orders.kind == I)
    edge_time = np.array([costs.edge(edge) for edge in range(last)])
    parts: list[tuple[Ints, Ints, Ints, Ints, Ints, Ints, Ints, Floats]] = []

    def add(maker: Ints, to: Ints, table: Ints, stride: int) -> None:
        stage, micro_batch = orders.stage[maker], orders.micro_batch[maker]
        remote = groups[stage] != groups[to]
        maker, stage, to, micro_batch = maker[remote], stage[remote], to[remote], micro_batch[remote]
        first = np.minimum(stage, to)
        time = edge_time[first] if stride == 1 else np.full(len(maker), costs.lane)
        user = table[to * n + micro_batch]
        parts.append((maker, maker, user, groups[stage], groups[to], first, np.full(len(maker), stride), time))

    def add_stride(stride: int) -> None:
        even = (orders.stage % 2 == 0) | (stride == 1)
        maker = np.flatnonzero(is_forward & even & (orders.stage + stride <= last))
        add(maker, orders.stage[maker] + stride, forward, stride)
        maker = np.flatnonzero(is_gradient & even & (orders.stage >= stride))
        add(maker, orders.stage[maker] - stride, backward, stride)

    add_stride(1)
    maker = np.flatnonzero(orders.kind == D)
    if len(maker):
        add(maker, orders.stage[maker] + 1, backward, 1)
    if costs.lane > 0:
        add_stride(2)
    made = Transfers(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return made if orders.late is None else _sent_late(made, orders.late, len(orders))


def _sent_late(transfers: Transfers, late: LateSends, num_actions: int) -> Transfers:
    """``transfers`` with what is sent late at the end, in the order of sending: the engine serves equals in order."""
    number = np.full((3, num_actions), -1, np.int64)
    number[transfers.stride, transfers.maker] = np.arange(len(transfers))
    at = number[late.stride, late.maker]
    costs = at >= 0  # a lane that costs nothing is no transfer here
    after, turn = transfers.after.copy(), np.full(len(transfers), -1, np.int64)
    after[at[costs]] = late.after[costs]
    turn[at[costs]] = np.flatnonzero(costs)
    order = np.argsort(turn, kind="stable")
    moved = dataclasses.replace(transfers, after=after)
    return Transfers(*(getattr(moved, field.name)[order] for field in dataclasses.fields(Transfers)))


def _in_turn(transfers: Transfers, orders: Orders) -> tuple[Ints, Ints]:
    """Pairs of transfers that one port serves one right after the other; none where ports serve what comes."""
    if orders.ports is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    number = np.full(len(orders), -1, np.int64)
    near = np.flatnonzero(transfers.stride == 1)
    number[transfers.maker[near]] = near
    at = number[orders.ports.maker]
    pairs = []
    for port, turn in ((transfers.sender, orders.ports.sent), (transfers.receiver, orders.ports.received)):
        mine = at[np.lexsort((turn, port[at]))]
        same = port[mine[1:]] == port[mine[:-1]]
        pairs.append((mine[:-1][same], mine[1:][same]))
    return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])


def simulate_orders(
    orders: Orders,
    costs: StageCosts,
    *,
    compute: Floats | None = None,
    between: Floats | None = None,
    latency: tuple[float, float] = (0.0, 0.0),
) -> Run:
    """Run ``orders``; the light form of ``simulate``.

    Args:
        orders: what is computed, in which order.
        costs: of stages and transfers.
        compute: time of every compute action, where it is not what ``costs`` says (one entry an action of ``orders``).
        between: what a group does after every action before it is free for the next, while that one's messages are
            under way (one entry an action).
        latency: from the moment when the ports are free again until the message can be used: of an M2N or its gradient,
            and of an N2M or its.

    Raises:
        ValueError: where the orders wait for each other in a circle.
    """
    transfers = transfers_of(orders, costs)
    count, num_groups = len(orders), len(orders.bounds) - 1
    follows = np.ones(max(count - 1, 0), np.bool_)
    follows[orders.bounds[1:-1][(orders.bounds[1:-1] > 0) & (orders.bounds[1:-1] < count)] - 1] = False
    chain = np.flatnonzero(follows)
    number = count + np.arange(len(transfers))
    used = transfers.user >= 0
    none = np.full(count, -1, np.int64)
    pauses = np.zeros(0) if between is None else between[chain]
    messages = np.flatnonzero(used & (transfers.stride == 1)) if any(latency) else np.empty(0, np.int64)
    late = np.where(transfers.first_stage[messages] % 2 == 1, latency[1], latency[0])
    extra = count + len(transfers) + np.arange(len(pauses) + len(messages))
    freed = extra[: len(pauses)] if between is not None else chain
    arrived = number.copy()
    arrived[messages] = extra[len(pauses) :]
    alone = np.full(len(extra), -1, np.int64)
    turn, next_turn = _in_turn(transfers, orders)
    times = run(
        Tasks(
            duration=np.concatenate(
                (durations(orders, costs) if compute is None else compute, transfers.duration, pauses, late)
            ),
            first=np.concatenate((none, transfers.sender, alone)),
            second=np.concatenate((none, num_groups + transfers.receiver, alone)),
            priority=np.zeros(count + len(transfers) + len(extra), np.int64),
            before=np.concatenate(
                (chain[: len(pauses)], freed, transfers.after, number[messages], arrived[used], number[turn])
            ),
            after=np.concatenate(
                (extra[: len(pauses)], chain + 1, number, arrived[messages], transfers.user[used], number[next_turn])
            ),
            num_resources=2 * num_groups,
        )
    )
    return Run(
        orders=orders,
        transfers=transfers,
        start=times.start[:count],
        end=times.end[:count],
        transfer_start=times.start[count : count + len(transfers)],
        transfer_end=times.end[count : count + len(transfers)],
    )


def simulate(schedule: Schedule, costs: StageCosts) -> Timeline:
    """Run a schedule. Every transfer starts as early as it can once it is sent: when it is made, or at its late SEND.

    Raises:
        ValueError: where its compute actions wait for each other in a circle.
    """
    return timeline(schedule, simulate_orders(Orders.of(schedule), costs))


def timeline(schedule: Schedule, run: Run) -> Timeline:
    """``run`` as spans."""
    orders, transfers = run.orders, run.transfers
    actions = _actions(np.take(_KINDS, orders.kind), orders.stage >> 1, orders.micro_batch)
    takes_time = orders.kind != D
    made_by = orders.kind[transfers.maker]
    edges = np.where(transfers.first_stage % 2 == 1, _N2M, np.where(made_by == D, _AGAIN, _M2N))
    sends = _actions(
        np.full(len(transfers), Kind.SEND),
        transfers.first_stage >> 1,
        orders.micro_batch[transfers.maker],
        np.take(_EDGES, np.where(transfers.stride == 2, _LANE, edges)),
        (made_by == B) | (made_by == I),
    )
    in_order = np.argsort(run.transfer_start, kind="stable")
    compute: dict[Group, tuple[Span, ...]] = {}
    sent: dict[Group, tuple[Span, ...]] = {}
    for number, group in enumerate(orders.placement.groups):
        mine = np.arange(orders.bounds[number], orders.bounds[number + 1])
        compute[group] = _spans(mine[takes_time[mine]], actions, run.start, run.end)
        mine = in_order[transfers.sender[in_order] == number]
        sent[group] = _spans(mine, sends, run.transfer_start, run.transfer_end)
    return Timeline(schedule=schedule, compute=compute, transfers=sent, makespan=run.makespan)


_KINDS = np.array(KINDS, dtype=object)
_EDGES = np.array(tuple(Edge), dtype=object)
_M2N, _N2M, _LANE, _AGAIN = (tuple(Edge).index(edge) for edge in (Edge.M2N, Edge.N2M, Edge.LANE, Edge.AGAIN))


def _actions(*columns: NDArray[Any]) -> list[Action]:
    return list(map(Action, *(column.tolist() for column in columns)))


def _spans(at: Ints, actions: list[Action], start: Floats, end: Floats) -> tuple[Span, ...]:
    return tuple(map(Span, [actions[index] for index in at.tolist()], start[at].tolist(), end[at].tolist()))
