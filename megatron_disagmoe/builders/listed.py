"""From a timetable of computes and messages to a schedule whose ports serve messages in order.

SENDs and RECVs are written so that nothing can lock, even where a SEND blocks until its message has been taken. Take
all messages in the order in which they start. When it is the turn of one, its sender has come to its SEND: what stands
before that began earlier. Its RECV stands before everything that begins no earlier on its receiver, so it is posted;
and what the receiver gets before it has been sent. Ports serve a lane as it comes: it stands right behind its maker,
and its turn comes after the SENDs before it. That is soon enough: its user also waits for the message that its maker
sends next.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from megatron_disagmoe.builders.folding import progress
from megatron_disagmoe.schedules.actions import Action, Edge, Kind, Schedule
from megatron_disagmoe.schedules.orders import KINDS, B, D, F, I, group_of_stage
from megatron_disagmoe.simulator.simulate import Run

#: Compute actions between a RECV and the user of its message, at least, as ``lowering.post_receives`` has it.
_AHEAD = 2

_Turn = tuple[float, int, int, int]
"""When something starts, what it is (message, compute), how far its micro-batch has come, what follows at once."""
_COMES, _COMPUTES = 0, 1


class _Message(NamedTuple):
    send: Action
    turn: _Turn
    maker: int
    user: int
    sender: int
    receiver: int

    @property
    def is_lane(self) -> bool:
        return self.send.edge is Edge.LANE

    @property
    def queue(self) -> tuple[int, bool, int]:
        """Messages whose receives keep one order: all of a port, and the lanes of a channel."""
        return self.receiver, self.is_lane, 2 * self.sender + self.send.gradient if self.is_lane else 0


def listed(run: Run, parameters: dict[str, object]) -> Schedule:
    """The schedule of ``run``, whose ports serve messages in the order in which they do there.

    Simulated it takes as long. Every transfer but for lanes must take some time.
    """
    orders = run.orders
    groups = range(len(orders.placement.groups))
    sent: list[list[_Message]] = [[] for _ in groups]
    received: list[list[_Message]] = [[] for _ in groups]
    for message in sorted(_messages(run), key=lambda each: each.turn):
        sent[message.sender].append(message)
    lists = [_List(run, number, sent[number]) for number in groups]
    for message in sorted((each for one in lists for each in one.sent), key=lambda each: each.turn):
        received[message.receiver].append(message)
    return Schedule(
        placement=orders.placement,
        num_micro_batches=orders.num_micro_batches,
        forward_only=orders.forward_only,
        actions={
            group: lists[number].with_receives(received[number])
            for number, group in enumerate(orders.placement.groups)
        },
        parameters=parameters,
        ports_in_order=True,
    )


def _messages(run: Run) -> list[_Message]:
    """Everything sent from one group to another."""
    orders, transfers = run.orders, run.transfers
    way = progress(orders).tolist()
    micro_batch = orders.micro_batch.tolist()
    near = transfers.stride == 1
    assert (transfers.duration[near] > 0).all(), "they do not start and end at once"
    kind = orders.kind[transfers.maker]
    ends = (transfers.maker, transfers.user, transfers.sender, transfers.receiver)
    columns = (transfers.first_stage, kind == D, np.isin(kind, (B, I)), run.transfer_start, *ends)
    result = []
    for first, again, back, start, *rest in zip(*(column[near].tolist() for column in columns), strict=True):
        maker, user, sender, receiver = rest
        edge = Edge.AGAIN if again else (Edge.M2N, Edge.N2M)[first % 2]
        send = Action(Kind.SEND, first // 2, micro_batch[maker], edge, back)
        result.append(_Message(send, (start, _COMES, way[maker], 0), maker, user, sender, receiver))
    return result + _lanes(run, way)


def _lanes(run: Run, way: list[int]) -> list[_Message]:
    orders, n, last = run.orders, run.orders.num_micro_batches, 2 * run.orders.placement.num_layers
    groups = group_of_stage(orders.placement).tolist()
    ends = run.end.tolist()
    result = []
    for kinds, stride in (((F,), 2), ((B, I), -2)):
        table = orders.position(*kinds).tolist()
        for stage in range(0, last + 1, 2):
            to = stage + stride
            if not 0 <= to <= last or groups[stage] == groups[to]:
                continue
            for micro_batch in range(n):
                maker, user = table[stage * n + micro_batch], table[to * n + micro_batch]
                if maker >= 0:
                    send = Action(Kind.SEND, min(stage, to) // 2, micro_batch, Edge.LANE, stride < 0)
                    turn = (ends[maker], _COMES, way[maker], 0)
                    result.append(_Message(send, turn, maker, user, groups[stage], groups[to]))
    return result


class _List:
    """One group's list: its computes, and its SENDs in the order of ``sent``."""

    def __init__(self, run: Run, number: int, sent: list[_Message]) -> None:
        orders = run.orders
        computes = list(range(int(orders.bounds[number]), int(orders.bounds[number + 1])))
        self.place = {position: at for at, position in enumerate(computes)}
        self.sent: list[_Message] = []
        self._elements: list[Action] = []
        self._turns: list[_Turn] = []  # the largest so far of every element
        self._computes: list[int] = []  # the element of every compute
        sends: list[list[_Message]] = [[] for _ in computes]
        latest = 0
        for message in sent:
            at = self.place[message.maker]
            if not message.is_lane:
                at = latest = max(latest, at)
            sends[at].append(message)
        for position, after in zip(computes, sends, strict=True):
            kind, stage, it = (int(column[position]) for column in (orders.kind, orders.stage, orders.micro_batch))
            self._computes.append(len(self._elements))
            self._add(Action(KINDS[kind], stage // 2, it), (float(run.start[position]), _COMPUTES, 0, 0))
            for message in sorted(after, key=lambda each: (not each.is_lane, each.turn)):
                turn = message.turn
                if message.is_lane and self._turns[-1] >= turn:
                    turn = (*self._turns[-1][:3], self._turns[-1][3] + 1)
                self._add(message.send, turn)
                self.sent.append(message._replace(turn=turn))

    def _add(self, element: Action, turn: _Turn) -> None:
        self._elements.append(element)
        self._turns.append(max(turn, self._turns[-1]) if self._turns else turn)

    def with_receives(self, received: list[_Message]) -> tuple[Action, ...]:
        """The list with the RECVs of ``received``, in their order."""
        slots: list[list[Action]] = [[] for _ in range(len(self._elements) + 1)]
        bound: dict[tuple[int, bool, int], int] = {}
        for message in reversed(received):
            slot = bisect_left(self._turns, message.turn)
            if message.user >= 0:
                slot = min(slot, self._computes[max(0, self.place[message.user] - _AHEAD)])
            bound[message.queue] = slot = min(slot, bound.get(message.queue, slot))
            slots[slot].append(message.send._replace(kind=Kind.RECV))
        result: list[Action] = []
        for slot_here, element in zip(slots, [*self._elements, None], strict=True):
            result += reversed(slot_here)
            if element is not None:
                result.append(element)
        return tuple(result)
