"""Transfers: each exactly once at both ends, in one order on each channel, after its maker and before its user."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.schedules.actions import Action, Edge, Kind
from megatron_disagmoe.schedules.dataflow import Channel
from megatron_disagmoe.schedules.ports import Ports, ports_of
from megatron_disagmoe.schedules.table import EDGES, RECV, SEND, Bools, Ints, Table
from megatron_disagmoe.schedules.verifier.faults import FaultKind, Findings, describe
from megatron_disagmoe.schedules.verifier.work import Work, report


@dataclass(frozen=True)
class Transfers:
    """The transfers that have both ends: nodes of SEND, RECV and user, and which input of the user they are."""

    send: Ints
    receive: Ints
    user: Ints
    slot: Ints
    peak_posted: dict[Channel, int]


def check_transfers(table: Table, work: Work, found: Findings, *, max_posted: int | None) -> Transfers:
    """Match every SEND with its RECV and report what has no match, is misplaced or comes in another order.

    A receive counts as posted from its RECV until the action that uses it starts.
    """
    ports = ports_of(table)
    n, size = table.num_micro_batches, len(ports.channel) * table.num_micro_batches
    key = _keys(table, ports, found)
    maker, user = ports.makers(work.of), ports.users(work.of)
    again = np.repeat(np.arange(len(ports.channel)) // table.num_layers == _AGAIN, n)
    expected = np.repeat(ports.channel >= 0, n) & (~again | (maker >= 0))
    ends = []
    for code, kind, text in (
        (SEND, FaultKind.ORPHAN_SEND, "is sent twice; nobody receives it again"),
        (RECV, FaultKind.DUPLICATE_RECEIVE, "is received twice; it is sent once"),
    ):
        nodes = np.flatnonzero((table.kind == code) & (key >= 0))
        first = table.first_nodes(nodes, key[nodes], size)
        ends.append(np.where(expected, first, -1))
        extra = nodes[first[key[nodes]] != nodes]
        for at in found.first(kind, np.ones(len(extra), np.bool_)):
            node = int(extra[at])
            report(table, found, kind, node, f"{describe(table.action(node))} {text}", first[key[node]])
        unasked = nodes[~expected[key[nodes]]]
        for at in found.first(FaultKind.IMPOSSIBLE_ACTION, np.ones(len(unasked), np.bool_)):
            node = int(unasked[at])
            message = f"{describe(table.action(node))} repeats a dispatch, but no D asks for it"
            report(table, found, FaultKind.IMPOSSIBLE_ACTION, node, message)
    send, receive = ends
    _check_matches(table, found, send, receive, expected, user)
    _check_work_order(table, found, send, receive, maker, user)
    both = np.flatnonzero((send >= 0) & (receive >= 0))
    channel = ports.channel[both // n]
    _check_fifo(table, found, ports, channel, send[both], receive[both])
    used = both[user[both] > receive[both]]
    peak = _check_posted(table, found, ports, used, receive, user, max_posted=max_posted)
    both = both[user[both] >= 0]
    return Transfers(send[both], receive[both], user[both], ports.slot[both // n], peak)


_AGAIN = EDGES.index(Edge.AGAIN) * 2


def _keys(table: Table, ports: Ports, found: Findings) -> Ints:
    """For every node that is a possible transfer on the right group ``port * num_micro_batches + micro_batch``."""
    n = table.num_micro_batches
    is_transfer = table.kind >= SEND
    in_range = (
        is_transfer
        & (table.edge >= 0)
        & (table.layer >= 0)
        & (table.layer < table.num_layers)
        & (table.micro_batch >= 0)
        & (table.micro_batch < n)
    )
    port = np.where(in_range, (table.edge * 2 + table.gradient) * table.num_layers + table.layer, 0)
    possible = in_range & (ports.channel[port] >= 0)
    for node in found.first(FaultKind.IMPOSSIBLE_ACTION, is_transfer & ~possible):
        message = (
            f"{describe(table.action(node))} is no transfer of this schedule ({table.num_layers} layers, {n} "
            f"micro-batches{', forward only' if table.schedule.forward_only else ''}; a lane within one group is none)"
        )
        report(table, found, FaultKind.IMPOSSIBLE_ACTION, node, message)
    home = np.where(table.kind == SEND, ports.sender[port], ports.receiver[port])
    for node in found.first(FaultKind.WRONG_GROUP, possible & (home != table.group)):
        message = f"{describe(table.action(node))} belongs on {table.groups[home[node]]}"
        report(table, found, FaultKind.WRONG_GROUP, node, message)
    return np.where(possible & (home == table.group), port * n + table.micro_batch, -1)


def _transfer(table: Table, key: int, kind: Kind) -> Action:
    port, micro_batch = divmod(key, table.num_micro_batches)
    edge_and_way, layer = divmod(port, table.num_layers)
    return Action(kind, layer, micro_batch, EDGES[edge_and_way // 2], bool(edge_and_way % 2))


def _check_matches(table: Table, found: Findings, send: Ints, receive: Ints, expected: Bools, user: Ints) -> None:
    placement = table.schedule.placement
    for key in found.first(FaultKind.MISSING_TRANSFER, expected & (send < 0) & (receive < 0)):
        action = _transfer(table, key, Kind.RECV)
        assert action.edge is not None, "it was made from a port"
        _, group = placement.ends(action.edge, action.layer, gradient=action.gradient)
        marks = [table.place(int(user[key]))] if user[key] >= 0 else []
        message = f"{describe(action)} is neither sent nor received, but the stage that needs it cannot run without"
        found.add(FaultKind.MISSING_TRANSFER, group, action, message, marks=marks)
    for kind, here, there, other in (
        (FaultKind.MISSING_RECEIVE, send, receive, Kind.RECV),
        (FaultKind.MISSING_SEND, receive, send, Kind.SEND),
    ):
        for key in found.first(kind, (here >= 0) & (there < 0)):
            node = int(here[key])
            action = _transfer(table, key, other)
            assert action.edge is not None, "it was made from a port"
            sender, receiver = placement.ends(action.edge, action.layer, gradient=action.gradient)
            group = receiver if other is Kind.RECV else sender
            marks = [table.place(int(end)) for end in (node, user[key]) if end >= 0]
            message = f"{describe(table.action(node))} of {marks[0].group} has no {describe(action)} on {group}"
            found.add(kind, group, action, message, marks=marks)


def _check_work_order(table: Table, found: Findings, send: Ints, receive: Ints, maker: Ints, user: Ints) -> None:
    for key in found.first(FaultKind.SEND_BEFORE_WORK, (send >= 0) & (maker >= 0) & (send < maker)):
        node, other = int(send[key]), int(maker[key])
        message = f"{describe(table.action(node))} stands before {describe(table.action(other))}, which makes it"
        report(table, found, FaultKind.SEND_BEFORE_WORK, node, message, other)
    for key in found.first(FaultKind.RECEIVE_AFTER_USE, (receive >= 0) & (user >= 0) & (receive > user)):
        node, other = int(receive[key]), int(user[key])
        message = f"{describe(table.action(node))} stands after {describe(table.action(other))}, which waits for it"
        report(table, found, FaultKind.RECEIVE_AFTER_USE, node, message, other)


def _check_fifo(table: Table, found: Findings, ports: Ports, channel: Ints, send: Ints, receive: Ints) -> None:
    """The k-th receive of a channel must be for its k-th send."""
    by_send, by_receive = np.lexsort((send, channel)), np.lexsort((receive, channel))
    for at in found.first(FaultKind.FIFO_SWAP, by_send != by_receive):
        sent, node = int(send[by_send[at]]), int(receive[by_receive[at]])
        message = (
            f"channel {ports.channels[channel[by_send[at]]]} delivers {describe(table.action(sent))} where "
            f"{describe(table.action(node))} is posted"
        )
        report(table, found, FaultKind.FIFO_SWAP, node, message, sent)


def _check_posted(
    table: Table, found: Findings, ports: Ports, used: Ints, receive: Ints, user: Ints, *, max_posted: int | None
) -> dict[Channel, int]:
    """The most receives outstanding on each channel; a fault where that is more than ``max_posted``."""
    channel = np.tile(ports.channel[used // table.num_micro_batches], 2)
    nodes = np.concatenate((receive[used], user[used]))
    change = np.repeat(np.array([1, -1]), len(used))
    order = np.lexsort((nodes, channel))
    channel, nodes, change = channel[order], nodes[order], change[order]
    posted = np.cumsum(change)  # each channel ends at zero, so one running sum serves all
    peak = np.zeros(len(ports.channels), np.int64)
    np.maximum.at(peak, channel, posted)
    if max_posted is not None:
        over = posted > max_posted
        _, first = np.unique(channel[over], return_index=True)
        for at in found.first(FaultKind.TOO_MANY_POSTED, _only(np.flatnonzero(over)[first], len(over))):
            message = (
                f"{describe(table.action(int(nodes[at])))} is receive {max_posted + 1} outstanding on channel "
                f"{ports.channels[channel[at]]}; the bound is {max_posted}, this channel needs {peak[channel[at]]}"
            )
            report(table, found, FaultKind.TOO_MANY_POSTED, int(nodes[at]), message)
    return {name: int(most) for name, most in zip(ports.channels, peak, strict=True) if most}


def _only(indices: Ints, size: int) -> Bools:
    result = np.zeros(size, np.bool_)
    result[indices] = True
    return result
