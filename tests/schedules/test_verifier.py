"""Each kind of fault by hand, how it is reported and drawn, and how long verifying takes."""

from __future__ import annotations

import time

import pytest

from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.schedules.actions import Action, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.schedules.lowering import lowered
from megatron_disagmoe.schedules.text import loads
from megatron_disagmoe.schedules.verifier import FaultKind, UnsafeScheduleError, draw_grid, ensure_safe, verify

RING = """\
disagmoe-schedule 1
attention-groups 2
ffn-groups 1
micro-batches 2
forward-only no
attention 0 1
ffn 0
A0: F0.0 >M2N/0.0 >LANE/0.0 F0.1 >M2N/0.1 >LANE/0.1 <dM2N/0.0 <dLANE/0.0 B0.0 <dM2N/0.1 <dLANE/0.1 B0.1
A1: <LANE/0.0 <N2M/0.0 <LANE/0.1 F1.0 B1.0 >dN2M/0.0 >dLANE/0.0 <N2M/0.1 F1.1 I1.1 >dN2M/0.1 >dLANE/0.1 W1.1
F0: <M2N/0.0 <M2N/0.1 F0.0 >N2M/0.0 F0.1 <dN2M/0.0 >N2M/0.1 B0.0 >dM2N/0.0 <dN2M/0.1 B0.1 >dM2N/0.1
"""
LOCAL = """\
disagmoe-schedule 1
attention-groups 1
ffn-groups 1
micro-batches 1
forward-only no
attention 0 0
ffn 0
A0: F0.0 >M2N/0.0 <N2M/0.0 F1.0 B1.0 >dN2M/0.0 D0.0 >AGAIN/0.0 <dM2N/0.0 B0.0
F0: <M2N/0.0 F0.0 >N2M/0.0 <dN2M/0.0 <AGAIN/0.0 I0.0 >dM2N/0.0 W0.0
"""


@pytest.mark.parametrize("text", [RING, LOCAL])
def test_the_examples_are_safe(text: str) -> None:
    report = verify(loads(text))
    assert report.ok
    assert not report.faults


def test_peaks_by_hand() -> None:
    report = verify(loads(RING))
    assert {str(group): peak for group, peak in report.peak_live.items()} == {"A0": 2, "A1": 1, "F0": 2}
    assert {str(channel): peak for channel, peak in report.peak_posted.items()} == {
        "M2N A0->F0": 2,
        "N2M F0->A1": 1,
        "LANE A0->A1": 2,
        "dN2M A1->F0": 1,
        "dM2N F0->A0": 1,
        "dLANE A1->A0": 1,
    }
    assert {str(group): peak for group, peak in verify(loads(LOCAL)).peak_live.items()} == {"A0": 2, "F0": 1}


@pytest.mark.parametrize(
    ("text", "old", "new", "kind", "group", "action"),
    [
        (RING, "W1.1", "W2.1", "impossible-action", "A1", "W2.1"),
        (RING, "W1.1", "W1.2", "impossible-action", "A1", "W1.2"),
        (LOCAL, "<N2M/0.0", "<LANE/0.0", "impossible-action", "A0", "<LANE/0.0"),
        (LOCAL, "D0.0 ", "", "impossible-action", "F0", "<AGAIN/0.0"),
        (RING, "<LANE/0.0", "<AGAIN/0.0", "wrong-group", "A1", "<AGAIN/0.0"),
        (RING, "F0.1 >M2N/0.1", "F0.1 >N2M/0.1", "wrong-group", "A0", ">N2M/0.1"),
        (RING, "W1.1", "W1.1 B0.1", "wrong-group", "A1", "B0.1"),
        (RING, "W1.1", "", "missing-work", "A1", "W1.1"),
        (RING, "I1.1", "", "missing-work", "A1", "I1.1"),
        (RING, "F1.0 B1.0", "F1.0", "missing-work", "A1", "B1.0"),
        (RING, "W1.1", "W1.1 W1.1", "repeated-work", "A1", "W1.1"),
        (RING, "W1.1", "W1.1 W1.0", "repeated-work", "A1", "W1.0"),
        (RING, "F1.0 B1.0", "B1.0 F1.0", "backward-before-forward", "A1", "B1.0"),
        (
            RING,
            "I1.1 >dN2M/0.1 >dLANE/0.1 W1.1",
            "W1.1 I1.1 >dN2M/0.1 >dLANE/0.1",
            "weights-before-inputs",
            "A1",
            "W1.1",
        ),
        (LOCAL, "F0.0 >M2N/0.0", "D0.0 F0.0 >M2N/0.0", "redispatch-out-of-order", "A0", "D0.0"),
        (LOCAL, "D0.0 >AGAIN/0.0 <dM2N/0.0 B0.0", "<dM2N/0.0 B0.0 D0.0", "redispatch-out-of-order", "A0", "B0.0"),
        (LOCAL, "F1.0 B1.0 >dN2M/0.0", "B0.0 F1.0 B1.0 >dN2M/0.0", "handover-out-of-order", "A0", "B0.0"),
        (RING, "<M2N/0.0 <M2N/0.1", "<M2N/0.0 <M2N/0.0", "duplicate-receive", "F0", "<M2N/0.0"),
        (RING, "<M2N/0.0 <M2N/0.1", "<M2N/0.0", "missing-receive", "F0", "<M2N/0.1"),
        (RING, "<LANE/0.0 <N2M/0.0 <LANE/0.1", "<N2M/0.0 <LANE/0.0", "missing-receive", "A1", "<LANE/0.1"),
        (RING, "F0.1 >M2N/0.1", "F0.1", "missing-send", "A0", ">M2N/0.1"),
        (RING, ">M2N/0.0", ">M2N/0.0 >M2N/0.0", "orphan-send", "A0", ">M2N/0.0"),
        (RING, "F0.0 >M2N/0.0", ">M2N/0.0 F0.0", "send-before-work", "A0", ">M2N/0.0"),
        (RING, "<M2N/0.1 F0.0 >N2M/0.0 F0.1", "F0.0 >N2M/0.0 F0.1 <M2N/0.1", "receive-after-use", "F0", "<M2N/0.1"),
        (RING, "<M2N/0.0 <M2N/0.1", "<M2N/0.1 <M2N/0.0", "fifo-swap", "F0", "<M2N/0.1"),
        (RING, ">dN2M/0.0 >dLANE/0.0 <N2M/0.1", ">dLANE/0.0 <N2M/0.1 >dN2M/0.0", None, "", ""),
        (
            RING,
            ">M2N/0.0 >LANE/0.0 F0.1 >M2N/0.1",
            "F0.1 >M2N/0.1 >M2N/0.0 >LANE/0.0",
            "fifo-swap",
            "F0",
            "<M2N/0.0",
        ),
        (
            RING.replace("<M2N/0.0 <M2N/0.1", "<M2N/0.1 <M2N/0.0").replace(
                "<LANE/0.0 <N2M/0.0 <LANE/0.1", "<LANE/0.1 <N2M/0.0 <LANE/0.0"
            ),
            ">M2N/0.0 >LANE/0.0 F0.1 >M2N/0.1 >LANE/0.1",
            "F0.1 >M2N/0.1 >LANE/0.1 >M2N/0.0 >LANE/0.0",  # in the order of the receives
            None,
            "",
            "",
        ),
        (RING, "<M2N/0.0 <M2N/0.1 F0.0 >N2M/0.0", "<M2N/0.0 F0.0 >N2M/0.0 <M2N/0.1", None, "", ""),
    ],
)
def test_faults_by_hand(text: str, old: str, new: str, kind: str | None, group: str, action: str) -> None:
    assert text.count(old) == 1
    schedule = loads(text.replace(old, new))
    report = verify(schedule)
    assert report.ok == (kind is None)
    found = [fault.to_json(draw_grid(schedule, fault)) for fault in report.faults]
    if kind is not None:
        assert [fault for fault in found if (fault["kind"], fault["rank"], fault["action"]) == (kind, group, action)]


def test_both_transfers_missing_is_reported_where_the_data_is_needed() -> None:
    schedule = loads(RING.replace("F0.1 >M2N/0.1", "F0.1").replace("<M2N/0.0 <M2N/0.1", "<M2N/0.0"))
    (fault,) = verify(schedule).faults
    assert fault.kind is FaultKind.MISSING_TRANSFER
    assert str(fault).startswith("F0: missing-transfer: <M2N/0.1 ")
    assert "[F0.1]" in draw_grid(schedule, fault)


def test_crossing_sends() -> None:
    """A0 sends forward while F0 sends the gradient back, and neither has posted its receive."""
    schedule = loads(
        RING.replace("<LANE/0.1 <dM2N/0.0", "<dM2N/0.0").replace(
            "F0: <M2N/0.0 <M2N/0.1 F0.0 >N2M/0.0 F0.1 <dN2M/0.0 >N2M/0.1 B0.0 >dM2N/0.0",
            "F0: <M2N/0.0 F0.0 >N2M/0.0 <dN2M/0.0 B0.0 >dM2N/0.0 <M2N/0.1 F0.1 >N2M/0.1",
        )
    )
    (fault,) = verify(schedule).faults
    assert fault.kind is FaultKind.DEADLOCK
    assert fault.message == (
        "crossing sends: A0 is at >M2N/0.1 and waits for <M2N/0.1 of F0; "
        "F0 is at >dM2N/0.0 and waits for <dM2N/0.0 of A0"
    )
    assert draw_grid(schedule, fault, around=2) == "\n".join(
        [
            "A0 #4 | ... >LANE/0.0     F0.1    [>M2N/0.1] >LANE/0.1 [<dM2N/0.0] ...",
            "      |                           ^^^^^^^^^^           ^^^^^^^^^^^",
            "F0 #6 | ...    B0.0   [>dM2N/0.0] [<M2N/0.1]    F0.1     >N2M/0.1  ...",
            "      |               ^^^^^^^^^^^ ^^^^^^^^^^",
        ]
    )


def test_a_cycle_through_computes_is_a_deadlock_too() -> None:
    """A0 waits for the gradient of micro-batch 0 before it starts 1; F0 must not start with 1 first."""
    text = RING.replace(
        "F0.1 >M2N/0.1 >LANE/0.1 <dM2N/0.0 <dLANE/0.0 B0.0", "<dM2N/0.0 <dLANE/0.0 B0.0 F0.1 >M2N/0.1 >LANE/0.1"
    )
    report = verify(loads(text))
    assert [fault.kind for fault in report.faults] == [FaultKind.DEADLOCK]
    assert "crossing" not in report.faults[0].message
    back_first = "<dN2M/0.0 B0.0 >dM2N/0.0 F0.1 >N2M/0.1"
    assert verify(loads(text.replace("F0.1 <dN2M/0.0 >N2M/0.1 B0.0 >dM2N/0.0", back_first))).ok


def test_groups_that_do_not_exist_and_groups_without_a_list() -> None:
    schedule = loads(RING)
    actions = dict(schedule.actions)
    actions[Group(Side.F, 7)] = actions.pop(Group(Side.F, 0))
    report = verify(Schedule(schedule.placement, 2, False, actions, {}))
    assert report.faults[0].kind is FaultKind.WRONG_GROUP
    assert report.faults[0].group == Group(Side.F, 7)
    assert report.counts[FaultKind.MISSING_WORK] == 4


def test_caps() -> None:
    schedule = loads(RING)
    assert verify(schedule, max_live=2, max_posted=2).ok
    live = verify(schedule, max_live=1)
    assert [(str(fault.group), fault.action) for fault in live.faults] == [
        ("A0", Action(Kind.F, 0, 1)),
        ("F0", Action(Kind.F, 0, 1)),
    ]
    assert {fault.kind for fault in live.faults} == {FaultKind.LIVE_OVER_CAP}
    posted = verify(schedule, max_posted=1)
    assert {fault.kind for fault in posted.faults} == {FaultKind.TOO_MANY_POSTED}
    assert [str(fault.group) for fault in posted.faults] == ["F0", "A1"]
    with pytest.raises(ValueError, match="max_live is 0"):
        verify(schedule, max_live=0)


def test_reports_are_limited_and_counted() -> None:
    placement = Placement.round_robin(num_layers=4, num_attention_groups=1, num_ffn_groups=1)
    schedule = lowered(sequential(placement, num_micro_batches=8))
    empty = Schedule(placement, 8, False, {**schedule.actions, Group(Side.F, 0): ()}, {})
    report = verify(empty, limit=3)
    assert report.counts[FaultKind.MISSING_WORK] == 4 * 8 * 2
    assert sum(fault.kind is FaultKind.MISSING_WORK for fault in report.faults) == 3
    assert "missing-work: 61 more not shown" in report.explain()


def test_ensure_safe_raises_with_the_grid() -> None:
    assert ensure_safe(loads(RING)).ok
    with pytest.raises(UnsafeScheduleError, match=r"fifo-swap(.|\n)*\[<M2N/0\.1\]"):
        ensure_safe(loads(RING.replace("<M2N/0.0 <M2N/0.1", "<M2N/0.1 <M2N/0.0")))


def test_128_groups_94_layers_512_micro_batches_in_under_10_seconds() -> None:
    placement = Placement.round_robin(num_layers=94, num_attention_groups=64, num_ffn_groups=64)
    schedule = lowered(sequential(placement, num_micro_batches=512))
    assert sum(map(len, schedule.actions.values())) == 2 * 512 * (95 + 94) + 2 * 2 * 512 * 3 * 94
    start = time.perf_counter()
    assert verify(schedule).ok
    assert time.perf_counter() - start < 10
