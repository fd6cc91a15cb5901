"""The verifier against an independent oracle: valid schedules pass, every mutation that breaks safety is caught."""

from __future__ import annotations

import contextlib
import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.schedules.actions import Placement, Schedule
from megatron_disagmoe.schedules.liveness import live_over_time, peak_live
from megatron_disagmoe.schedules.lowering import add_communication, compute_only, lowered
from megatron_disagmoe.schedules.verifier import draw_grid, verify
from tests.schedules.mutations import TRIED, mutated
from tests.schedules.oracle import why_unsafe
from tests.schedules.strategies import ports_in_order, runnable_computes, sent_late


@st.composite
def built(draw: st.DrawFn) -> Schedule:
    """What a builder makes, with its transfers."""
    p_a, p_f = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.integers(max(p_a, p_f), 6))
    placement = Placement.round_robin(num_layers=layers, num_attention_groups=p_a, num_ffn_groups=p_f)
    return lowered(sequential(placement, num_micro_batches=draw(st.integers(1, 4)), forward_only=draw(st.booleans())))


valid_schedules = built() | runnable_computes().map(lowered)


def agree(schedule: Schedule, *, max_live: int | None = None, max_posted: int | None = None) -> bool:
    """True where verifier and oracle both call it safe; fails where they differ."""
    report = verify(schedule, max_live=max_live, max_posted=max_posted)
    schedule = report.schedule  # without a RECV left, transfers have been derived
    reason = why_unsafe(schedule, max_live=max_live, max_posted=max_posted)
    assert report.ok == (reason is None), f"oracle: {reason}; verifier: {report.explain()}"
    for fault in report.faults:
        assert draw_grid(schedule, fault) or not fault.marks
    return report.ok


@given(valid_schedules)
@settings(deadline=None, max_examples=200)
def test_valid_schedules_pass(schedule: Schedule) -> None:
    assert agree(schedule)
    TRIED["valid schedules", "passed"] += 1


@given(valid_schedules, st.data())
@settings(deadline=None, max_examples=1000)
def test_mutations(schedule: Schedule, data: st.DataObject) -> None:
    name, damaged = data.draw(mutated(schedule))
    TRIED[name, "safe, passed" if agree(damaged) else "unsafe, caught"] += 1


@given(valid_schedules, st.data())
@settings(deadline=None, max_examples=300)
def test_several_mutations_at_once(schedule: Schedule, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(2, 4))):
        with contextlib.suppress(IndexError):
            _, schedule = data.draw(mutated(schedule))
    TRIED["several at once", "safe, passed" if agree(schedule) else "unsafe, caught"] += 1


@given(valid_schedules, st.data())
@settings(deadline=None, max_examples=300)
def test_mutated_compute_order(schedule: Schedule, data: st.DataObject) -> None:
    """Damage before the transfers are derived: lowering must neither hide it nor fall over it."""
    name, damaged = data.draw(mutated(compute_only(schedule)))
    TRIED[f"compute only: {name}", "safe, passed" if agree(lowered(damaged)) else "unsafe, caught"] += 1


@given(sent_late(runnable_computes()))
@settings(deadline=None, max_examples=300)
def test_messages_sent_late(schedule: Schedule) -> None:
    """Some wait for what cannot happen before they are sent; the others are safe."""
    TRIED["sent late", "safe, passed" if agree(schedule) else "unsafe, caught"] += 1


@given(sent_late(runnable_computes()), st.data())
@settings(deadline=None, max_examples=300)
def test_mutated_messages_sent_late(schedule: Schedule, data: st.DataObject) -> None:
    """Damage before the receives are derived, and after."""
    _, damaged = data.draw(mutated(schedule))
    TRIED["sent late, then damaged", "safe, passed" if agree(lowered(damaged)) else "unsafe, caught"] += 1
    _, damaged = data.draw(mutated(lowered(schedule)))
    TRIED["sent late, then damaged", "safe, passed" if agree(damaged) else "unsafe, caught"] += 1


@given(ports_in_order(runnable_computes() | sent_late(runnable_computes())))
@settings(deadline=None, max_examples=300)
def test_ports_in_order(schedule: Schedule) -> None:
    """Some ports wait for messages that wait for others; where every port serves what comes, fewer do."""
    ok = agree(schedule)
    assert agree(dataclasses.replace(schedule, ports_in_order=False)) or not ok
    TRIED["ports in order", "safe, passed" if ok else "unsafe, caught"] += 1


@given(ports_in_order(runnable_computes()), st.data())
@settings(deadline=None, max_examples=300)
def test_mutated_ports_in_order(schedule: Schedule, data: st.DataObject) -> None:
    _, damaged = data.draw(mutated(schedule))
    TRIED["ports in order, then damaged", "safe, passed" if agree(damaged) else "unsafe, caught"] += 1


@given(runnable_computes())
@settings(deadline=None, max_examples=200)
def test_unposted_receives(schedule: Schedule) -> None:
    """Receives just before their use are safe for some orders and cross for others."""
    TRIED["receives not posted ahead", "safe, passed" if agree(add_communication(schedule)) else "unsafe, caught"] += 1


@given(valid_schedules, st.integers(1, 6), st.integers(1, 4))
@settings(deadline=None, max_examples=200)
def test_bounds(schedule: Schedule, max_live: int, max_posted: int | None) -> None:
    ok = agree(schedule, max_live=max_live, max_posted=max_posted)
    TRIED["tight bounds", "safe, passed" if ok else "unsafe, caught"] += 1


@given(valid_schedules)
@settings(deadline=None, max_examples=100)
def test_peaks_are_the_least_bounds_that_hold(schedule: Schedule) -> None:
    report = verify(schedule)
    live, posted = max(report.peak_live.values()), max(report.peak_posted.values())
    assert why_unsafe(schedule, max_live=live, max_posted=posted) is None
    assert live == 1 or why_unsafe(schedule, max_live=live - 1) == "too many activations"
    assert posted == 1 or why_unsafe(schedule, max_posted=posted - 1) == "too many receives posted"
    assert report.peak_live == peak_live(schedule)
    assert all(counts[-1] <= 1 for counts in live_over_time(schedule).values() if counts)
