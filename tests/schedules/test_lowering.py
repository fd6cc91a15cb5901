"""Lowering: what it derives by hand-worked example, and that what it makes is safe under the strictest semantics."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.schedules.lowering import add_communication, compute_only, lowered, post_receives
from megatron_disagmoe.schedules.text import loads
from tests.schedules.oracle import why_unsafe
from tests.schedules.strategies import runnable_computes, sent_late

HEAD = """\
disagmoe-schedule 1
attention-groups {a}
ffn-groups {f}
micro-batches {n}
forward-only {forward_only}
attention {attention}
ffn {ffn}
"""


def text(lines: str, *, attention: str, ffn: str, n: int = 1, forward_only: str = "no") -> Schedule:
    groups = [len(set(side.split())) for side in (attention, ffn)]
    head = HEAD.format(a=groups[0], f=groups[1], n=n, forward_only=forward_only, attention=attention, ffn=ffn)
    return loads(head + lines)


def test_transfers_of_one_ring_by_hand() -> None:
    schedule = text("A0: F0.0 B0.0\nA1: F1.0 B1.0\nF0: F0.0 B0.0\n", attention="0 1", ffn="0")
    assert (
        add_communication(schedule).actions
        == text(
            "A0: F0.0 >M2N/0.0 >LANE/0.0 <dM2N/0.0 <dLANE/0.0 B0.0\n"
            "A1: <N2M/0.0 <LANE/0.0 F1.0 B1.0 >dN2M/0.0 >dLANE/0.0\n"
            "F0: <M2N/0.0 F0.0 >N2M/0.0 <dN2M/0.0 B0.0 >dM2N/0.0\n",
            attention="0 1",
            ffn="0",
        ).actions
    )


def test_a_lane_inside_one_group_is_no_transfer() -> None:
    schedule = text("A0: F0.0 F1.0\nF0: F0.0\n", attention="0 0", ffn="0", forward_only="yes")
    assert (
        add_communication(schedule).actions
        == text(
            "A0: F0.0 >M2N/0.0 <N2M/0.0 F1.0\nF0: <M2N/0.0 F0.0 >N2M/0.0\n",
            attention="0 0",
            ffn="0",
            forward_only="yes",
        ).actions
    )


def test_input_gradients_leave_after_i_and_redispatch_after_d() -> None:
    schedule = text("A0: F0.0 F1.0 I1.0 D0.0 W1.0 B0.0\nF0: F0.0 I0.0 W0.0\n", attention="0 0", ffn="0")
    assert (
        add_communication(schedule).actions
        == text(
            "A0: F0.0 >M2N/0.0 <N2M/0.0 F1.0 I1.0 >dN2M/0.0 D0.0 >AGAIN/0.0 W1.0 <dM2N/0.0 B0.0\n"
            "F0: <M2N/0.0 F0.0 >N2M/0.0 <AGAIN/0.0 <dN2M/0.0 I0.0 >dM2N/0.0 W0.0\n",
            attention="0 0",
            ffn="0",
        ).actions
    )


def test_receives_follow_the_order_of_sends() -> None:
    """F0 starts with micro-batch 1 though A0 sends 0 first: both receives stand before its first action."""
    schedule = text("A0: F0.0 F0.1 F1.1 F1.0\nF0: F0.1 F0.0\n", attention="0 0", ffn="0", n=2, forward_only="yes")
    assert (
        add_communication(schedule).actions[Group(Side.F, 0)]
        == text(
            "F0: <M2N/0.0 <M2N/0.1 F0.1 >N2M/0.1 F0.0 >N2M/0.0\n", attention="0 0", ffn="0", n=2, forward_only="yes"
        ).actions[Group(Side.F, 0)]
    )


def test_a_send_that_stands_later_stays_there() -> None:
    """M2N of micro-batch 0 leaves after the gradient of the tail has; the receives follow the order of the sends."""
    schedule = text(
        "A0: F0.0 F0.1 F1.1 B1.1 >dN2M/0.1 >M2N/0.0 F1.0 B1.0 B0.1 B0.0\nF0: F0.1 B0.1 F0.0 B0.0\n",
        attention="0 0",
        ffn="0",
        n=2,
    )
    sent = add_communication(schedule)
    assert (
        sent.actions
        == text(
            "A0: F0.0 F0.1 >M2N/0.1 <N2M/0.1 F1.1 B1.1 >dN2M/0.1 >M2N/0.0 <N2M/0.0 F1.0 B1.0 >dN2M/0.0 <dM2N/0.1 B0.1 "
            "<dM2N/0.0 B0.0\n"
            "F0: <M2N/0.1 F0.1 >N2M/0.1 <dN2M/0.1 B0.1 >dM2N/0.1 <M2N/0.0 F0.0 >N2M/0.0 <dN2M/0.0 B0.0 >dM2N/0.0\n",
            attention="0 0",
            ffn="0",
            n=2,
        ).actions
    )
    assert why_unsafe(post_receives(sent)) is None
    assert add_communication(sent) == sent


def test_ahead_counts_compute_actions() -> None:
    computes = "A0: F0.0 F0.1 F0.2 F1.0 F1.1 F1.2\nF0: F0.0 F0.1 F0.2\n"
    schedule = text(computes, attention="0 0", ffn="0", n=3, forward_only="yes")
    for ahead in (0, 1, 2, 3):
        actions = post_receives(add_communication(schedule), ahead=ahead).actions[Group(Side.A, 0)]
        for micro_batch in range(3):
            posted = actions.index(Action(Kind.RECV, 0, micro_batch, Edge.N2M))
            between = [a for a in actions[posted : actions.index(Action(Kind.F, 1, micro_batch))] if a.edge is None]
            assert len(between) >= ahead


def test_a_negative_distance_is_refused() -> None:
    placement = Placement.round_robin(num_layers=2, num_attention_groups=1, num_ffn_groups=1)
    with pytest.raises(ValueError, match="ahead is -1"):
        post_receives(sequential(placement, num_micro_batches=1), ahead=-1)


@given(runnable_computes(), st.integers(0, 4))
@settings(deadline=None)
def test_whatever_can_run_is_safe_once_lowered(schedule: Schedule, ahead: int) -> None:
    communicating = add_communication(schedule)
    ready = post_receives(communicating, ahead=ahead)
    assert why_unsafe(ready) is None
    assert compute_only(ready).actions == schedule.actions
    for group, actions in ready.actions.items():
        assert Counter(actions) == Counter(communicating.actions[group])
    assert lowered(ready) is ready


@given(sent_late(runnable_computes()))
@settings(deadline=None)
def test_sends_stay_where_they_are_written(schedule: Schedule) -> None:
    ready = lowered(schedule)
    for group, actions in ready.actions.items():
        assert tuple(action for action in actions if action.kind is not Kind.RECV) == schedule.actions[group]


@given(runnable_computes())
@settings(deadline=None)
def test_transfers_already_there_are_derived_anew(schedule: Schedule) -> None:
    assert add_communication(lowered(schedule)) == add_communication(schedule)


@pytest.mark.parametrize(("p_a", "p_f", "layers"), [(1, 1, 1), (2, 2, 4), (2, 3, 7), (4, 1, 5)])
@pytest.mark.parametrize("forward_only", [False, True])
def test_sequential(p_a: int, p_f: int, layers: int, forward_only: bool) -> None:
    placement = Placement.round_robin(num_layers=layers, num_attention_groups=p_a, num_ffn_groups=p_f)
    schedule = sequential(placement, num_micro_batches=3, forward_only=forward_only)
    most = max(*Counter(placement.attention).values(), *Counter(placement.ffn).values())
    assert why_unsafe(lowered(schedule), max_live=1 if forward_only else most) is None
    with pytest.raises(ValueError, match="at least one micro-batch, got 0"):
        sequential(placement, num_micro_batches=0)
