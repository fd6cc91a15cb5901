"""Compute actions: each exactly once, on its own group, in an order that its group can follow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind
from megatron_disagmoe.schedules.table import SEND, B, Bools, D, F, I, Ints, Table, W
from megatron_disagmoe.schedules.verifier.faults import FaultKind, Findings, describe


@dataclass(frozen=True)
class Work:
    """For every stage and micro-batch the node of each of its actions, -1 where there is none."""

    forward: Ints
    backward: Ints  # the B or the I: what makes the gradients of the stage's inputs
    redispatch: Ints

    def of(self, kind: Kind) -> Ints:
        """The nodes of the actions of ``kind``; B stands for I too."""
        assert kind in (Kind.F, Kind.B, Kind.D), "the others neither send nor receive"
        return {Kind.F: self.forward, Kind.B: self.backward, Kind.D: self.redispatch}[kind]


def check_work(table: Table, found: Findings) -> Work:
    """Find every compute action and report what is impossible, misplaced, missing, repeated or out of order."""
    _check_groups(table, found)
    good = _good_nodes(table, found)
    stage = _stages(table)
    first = []
    for kind in (F, B, I, W, D):
        nodes = np.flatnonzero(good & (table.kind == kind))
        first.append(table.first_nodes(nodes, stage[nodes], table.num_stages))
        repeated = nodes[first[kind][stage[nodes]] != nodes]
        for at in found.first(FaultKind.REPEATED_WORK, np.ones(len(repeated), np.bool_)):
            node = int(repeated[at])
            action = table.action(node)
            report(
                table,
                found,
                FaultKind.REPEATED_WORK,
                node,
                f"{describe(action)} is there twice",
                first[kind][stage[node]],
            )
    _check_missing(table, found, first)
    _check_order(table, found, first)
    work = Work(first[F], np.where(first[B] >= 0, first[B], first[I]), first[D])
    _check_handovers(table, found, work)
    return work


def _check_groups(table: Table, found: Findings) -> None:
    for group, actions in table.schedule.actions.items():
        if group not in table.groups and actions:
            found.add(
                FaultKind.WRONG_GROUP,
                group,
                actions[0],
                f"the placement has no group {group}, yet it has {len(actions)} actions",
            )


def _stages(table: Table) -> Ints:
    row = table.layer + np.where(table.on_attention, 0, table.num_layers + 1)
    return row * table.num_micro_batches + table.micro_batch


def _good_nodes(table: Table, found: Findings) -> Bools:
    """Compute actions that exist in this model and stand on the group that holds their stage."""
    compute = table.kind < SEND
    stages = table.num_layers + table.on_attention
    possible = (
        (table.edge < 0)
        & ~table.gradient
        & (table.layer >= 0)
        & (table.layer < stages)
        & (table.micro_batch >= 0)
        & (table.micro_batch < table.num_micro_batches)
    )
    if table.schedule.forward_only:
        possible &= table.kind == F
    possible &= (table.kind != D) | (table.on_attention & (table.layer < table.num_layers))
    for node in found.first(FaultKind.IMPOSSIBLE_ACTION, compute & ~possible):
        report(
            table,
            found,
            FaultKind.IMPOSSIBLE_ACTION,
            node,
            f"{describe(table.action(node))} names nothing that {table.place(node).group} could do here: there are "
            f"{stages[node]} stages and {table.num_micro_batches} micro-batches"
            + (
                ", and backward actions have no place in a forward-only schedule" if table.schedule.forward_only else ""
            ),
        )
    good = compute & possible
    row = np.where(good, table.layer + np.where(table.on_attention, 0, table.num_layers + 1), 0)
    here = table.group_of_row[row] == table.group
    for node in found.first(FaultKind.WRONG_GROUP, good & ~here):
        home = table.groups[table.group_of_row[row[node]]]
        action = table.action(node)
        report(
            table, found, FaultKind.WRONG_GROUP, node, f"{describe(action)} belongs on {home}, which holds this stage"
        )
    return good & here


def report(table: Table, found: Findings, kind: FaultKind, node: int, message: str, *others: int) -> None:
    """Report a node; ``others`` are further nodes to mark."""
    places = [table.place(int(other)) for other in (node, *others) if other >= 0]
    found.add(kind, places[0].group, table.action(node), message, marks=places)


def _stage_name(table: Table, stage: int) -> tuple[Group, int, int]:
    row, micro_batch = divmod(stage, table.num_micro_batches)
    return table.groups[table.group_of_row[row]], table.stage_of_row(row)[1], micro_batch


def _check_missing(table: Table, found: Findings, first: list[Ints]) -> None:
    has = [nodes >= 0 for nodes in first]
    absent = [(Kind.F, ~has[F])]
    if not table.schedule.forward_only:
        for node_kind in (I, W):
            for stage in found.first(FaultKind.REPEATED_WORK, has[B] & has[node_kind]):
                node = int(first[node_kind][stage])
                message = f"{describe(table.action(node))} repeats what B of the same stage does already"
                report(table, found, FaultKind.REPEATED_WORK, node, message, first[B][stage])
        absent += [
            (Kind.B, ~has[B] & ~has[I] & ~has[W]),
            (Kind.I, ~has[B] & ~has[I] & has[W]),
            (Kind.W, ~has[B] & has[I] & ~has[W]),
        ]
    for kind, where in absent:
        for stage in found.first(FaultKind.MISSING_WORK, where):
            group, layer, micro_batch = _stage_name(table, stage)
            action = Action(kind, layer, micro_batch)
            nearest = [table.place(int(nodes[stage])) for nodes in first if nodes[stage] >= 0]
            found.add(FaultKind.MISSING_WORK, group, action, f"{describe(action)} is nowhere", marks=nearest)


def _check_order(table: Table, found: Findings, first: list[Ints]) -> None:
    def check(kind: FaultKind, earlier: int, later: int) -> None:
        wrong = (first[earlier] >= 0) & (first[later] >= 0) & (first[earlier] > first[later])
        for stage in found.first(kind, wrong):
            node, other = int(first[later][stage]), int(first[earlier][stage])
            message = f"{describe(table.action(node))} stands before {describe(table.action(other))}, which it needs"
            report(table, found, kind, node, message, other)

    check(FaultKind.BACKWARD_BEFORE_FORWARD, F, B)
    check(FaultKind.BACKWARD_BEFORE_FORWARD, F, I)
    check(FaultKind.WEIGHTS_BEFORE_INPUTS, I, W)
    check(FaultKind.REDISPATCH_OUT_OF_ORDER, F, D)
    check(FaultKind.REDISPATCH_OUT_OF_ORDER, D, B)
    check(FaultKind.REDISPATCH_OUT_OF_ORDER, D, I)


def _check_handovers(table: Table, found: Findings, work: Work) -> None:
    """A lane inside one group is no transfer: the list itself must make before it uses."""
    n = table.num_micro_batches
    for layer in range(table.num_layers):
        if not table.schedule.placement.is_local(Edge.LANE, layer):
            continue
        here, after = slice(layer * n, (layer + 1) * n), slice((layer + 1) * n, (layer + 2) * n)
        for made, used in ((work.forward[here], work.forward[after]), (work.backward[after], work.backward[here])):
            wrong = (made >= 0) & (used >= 0) & (made > used)
            for micro_batch in found.first(FaultKind.HANDOVER_OUT_OF_ORDER, wrong):
                node, maker = int(used[micro_batch]), int(made[micro_batch])
                message = (
                    f"{describe(table.action(node))} takes the lane of layer {layer} over from "
                    f"{describe(table.action(maker))}, which stands after it"
                )
                report(table, found, FaultKind.HANDOVER_OUT_OF_ORDER, node, message, maker)
