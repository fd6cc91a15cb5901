"""Does the schedule run to its end when every SEND blocks until its receive is posted?

Lists are run as far as they go; what is left is stuck for good, since the outcome does not depend on timing (every
action waits for fixed other ones: a marked graph).
"""

from __future__ import annotations

import numpy as np

from megatron_disagmoe.schedules.actions import Edge
from megatron_disagmoe.schedules.table import EDGES, SEND, Ints, Table
from megatron_disagmoe.schedules.verifier.faults import FaultKind, Findings, describe
from megatron_disagmoe.schedules.verifier.transfers import Transfers
from megatron_disagmoe.schedules.verifier.work import report

_LANE = EDGES.index(Edge.LANE)


def check_deadlock(table: Table, transfers: Transfers, found: Findings) -> None:
    """Report each cycle of groups that wait for one another. Every transfer must have both ends."""
    needs = np.full((2, table.num_nodes), table.num_nodes, np.int64)
    needs[0, transfers.send] = transfers.receive
    assert transfers.slot.max(initial=0) < len(needs), "a stage has more inputs than there are columns"
    needs[transfers.slot, transfers.user] = transfers.send
    if table.schedule.ports_in_order:
        _wait_for_turns(table, transfers, needs[1])
    first, second = needs.tolist()
    cursor = _run(table.starts.tolist(), first, second)
    ends = table.starts[1:].tolist()
    stuck = {group: at for group, (at, end) in enumerate(zip(cursor, ends, strict=True)) if at < end}
    if not stuck:
        return
    waits_for: dict[int, int] = {}
    for group, node in stuck.items():
        missing = first[node] if _is_missing(table, cursor, first[node]) else second[node]
        waits_for[group] = missing
    _report_cycles(table, found, stuck, waits_for)


def _wait_for_turns(table: Table, transfers: Transfers, needs: Ints) -> None:
    """Where receiving ports keep their order, a SEND waits until what its receiver gets before has been sent.

    Sending ports keep theirs anyhow, as a SEND blocks its group.
    """
    near = table.edge[transfers.send] != _LANE
    send, receive = transfers.send[near], transfers.receive[near]
    order = np.argsort(receive)
    send, group = send[order], table.group[receive[order]]
    same = group[1:] == group[:-1]
    needs[send[1:][same]] = send[:-1][same]


def _run(starts: list[int], first: list[int], second: list[int]) -> list[int]:
    """Where each group's list stops; ``first`` and ``second`` give the nodes that a node waits for."""
    num_nodes = starts[-1]
    done = bytearray(num_nodes + 1)
    done[num_nodes] = 1  # "nothing" is always there
    cursor = starts[:-1]
    waiting: dict[int, list[int]] = {}
    ready = list(range(len(cursor)))
    while ready:
        group = ready.pop()
        node, end = cursor[group], starts[group + 1]
        while node < end:
            if not done[first[node]]:
                waiting.setdefault(first[node], []).append(group)
                break
            if not done[second[node]]:
                waiting.setdefault(second[node], []).append(group)
                break
            done[node] = 1
            if node in waiting:
                ready += waiting.pop(node)
            node += 1
        cursor[group] = node
    return cursor


def _is_missing(table: Table, cursor: list[int], node: int) -> bool:
    return node < table.num_nodes and node >= cursor[int(table.group[node])]


def _report_cycles(table: Table, found: Findings, stuck: dict[int, int], waits_for: dict[int, int]) -> None:
    seen: set[int] = set()
    for start in stuck:
        path: list[int] = []
        group = start
        while group not in seen:
            seen.add(group)
            path.append(group)
            group = int(table.group[waits_for[group]])
        if group in path:
            cycle = path[path.index(group) :]
            nodes = [stuck[member] for member in cycle]
            waits = "; ".join(
                f"{table.groups[member]} is at {describe(table.action(stuck[member]))} and waits for "
                f"{describe(table.action(waits_for[member]))} of {table.groups[table.group[waits_for[member]]]}"
                for member in cycle
            )
            crossing = "crossing sends: " if all(table.kind[node] == SEND for node in nodes) else ""
            others = [node for member in cycle for node in (stuck[member], waits_for[member])][1:]
            report(table, found, FaultKind.DEADLOCK, nodes[0], f"{crossing}{waits}", *others)
