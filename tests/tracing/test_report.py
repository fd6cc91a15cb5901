from __future__ import annotations

from pathlib import Path

import pytest

from megatron_disagmoe.drawing import Row
from megatron_disagmoe.schedules.actions import Action, Kind
from megatron_disagmoe.tracing.chrome import Event
from megatron_disagmoe.tracing.measured import chart_of_step
from megatron_disagmoe.tracing.merge import RankTrace, Transfer, load_traces, match_transfers
from megatron_disagmoe.tracing.recorder import TraceRecorder
from megatron_disagmoe.tracing.report import (
    RankFigures,
    Step,
    WaitSplits,
    covered,
    find_steps,
    rank_figures,
    typical_step,
)
from tests.tracing.traces import A0, F0, MICRO, record


def _figures(directory: Path, stretches: list[int], *, skip: int = 1) -> tuple[list[RankFigures], list[Step]]:
    record(directory, stretches)
    ranks = load_traces(directory)
    transfers, _ = match_transfers(ranks)
    steps = find_steps(ranks, skip=skip)
    return rank_figures(ranks, transfers, steps), steps


def test_known_figures(tmp_path: Path) -> None:
    (a, f), (step,) = _figures(tmp_path, [1])
    assert (step.iteration, step.start, step.end) == (0, 0, 100 * MICRO)
    assert a.as_json() == {
        "rank": 0,
        "group": "A0",
        "replica": 0,
        "step_s": pytest.approx(100e-6),
        "compute_s": pytest.approx(50e-6),
        "transfer_s": pytest.approx(10e-6),
        "exposed_communication_s": pytest.approx(10e-6),
        "stage_wait_s": pytest.approx(30e-6),
        "other_s": pytest.approx(10e-6),
    }
    assert (f.rank, f.group) == (1, F0)
    assert [f.step, f.compute, f.transfer, f.exposed, f.stage_wait, f.other] == pytest.approx(
        [100e-6, 20e-6, 10e-6, 10e-6, 16e-6, 54e-6]
    )


def test_warm_up_is_left_out_and_medians_are_taken(tmp_path: Path) -> None:
    (a, _), steps = _figures(tmp_path, [9, 1, 2, 5])
    assert [step.iteration for step in steps] == [1, 2, 3]
    assert [a.step, a.compute, a.exposed] == pytest.approx([200e-6, 100e-6, 20e-6])
    assert typical_step(steps).iteration == 2
    assert typical_step(steps[:2]).iteration == 1


@pytest.mark.parametrize("skip, left", [(0, [0, 1, 2]), (1, [1, 2]), (2, [2]), (7, [2])])
def test_a_step_is_always_left(tmp_path: Path, skip: int, left: list[int]) -> None:
    assert [step.iteration for step in _figures(tmp_path, [1, 1, 1], skip=skip)[1]] == left


def test_steps_must_be_shared(tmp_path: Path) -> None:
    record(tmp_path, [1])
    ranks = load_traces(tmp_path)
    with pytest.raises(ValueError, match="use 0 or more"):
        find_steps(ranks, skip=-1)
    lost = RankTrace(1, F0, 0, tuple(event for event in ranks[1].events if event.category != "step"))
    with pytest.raises(
        ValueError, match=r"no step was finished by every rank \(steps per rank: rank 0: 1, rank 1: 0\)"
    ):
        find_steps([ranks[0], lost])


def test_evaluation_is_no_training_step(tmp_path: Path) -> None:
    with TraceRecorder(0, A0, tmp_path) as a:
        for iteration, kinds, start in ((0, "FB", 0), (1, "FB", 100), (1, "F", 200), (1, "F", 300)):
            for kind in kinds:
                a.compute(Action(Kind(kind), 0, 0), start, start + 10)
            a.step(iteration, start, start + 50)
    ranks = load_traces(tmp_path)
    assert [step.start for step in find_steps(ranks, skip=0)] == [0, 100]
    evaluation = [RankTrace(0, A0, 0, tuple(e for e in ranks[0].events if e.start >= 200))]
    assert [step.start for step in find_steps(evaluation, skip=0)] == [200, 300]


@pytest.mark.parametrize(
    "intervals, expected",
    [
        ([], 0),
        ([(10, 20)], 10),
        ([(10, 20), (15, 30), (20, 25)], 20),
        ([(40, 60), (10, 20)], 30),
        ([(-50, 5), (95, 500)], 10),
        ([(-50, -5), (150, 160)], 0),
        ([(0, 500), (20, 30)], 100),
    ],
)
def test_covered_counts_overlaps_once(intervals: list[tuple[int, int]], expected: int) -> None:
    assert covered(intervals, (0, 100)) == expected


def _wait(start: int, end: int) -> Event:
    return Event("wait", "M2N", 0, 0, 0, 0, start, end)


@pytest.mark.parametrize(
    "wait, turn",
    [
        (_wait(0, 30), 20),  # posted meanwhile
        (_wait(25, 30), 25),  # posted before: all for the network
        (_wait(0, 10), 10),  # posted after: none
        (_wait(100, 140), 130),  # the next step's message, not the first's
        (_wait(200, 210), 200),  # no message known: all for the network
    ],
)
def test_waits_split_when_the_message_was_posted(wait: Event, turn: int) -> None:
    messages = [
        Transfer(
            0, 1, Event("send", "M2N", 0, 0, 1, 0, posted, posted + 9), Event("receive", "M2N", 0, 0, 0, 0, 0, seen)
        )
        for posted, seen in ((20, 30), (130, 140))
    ]
    assert WaitSplits(messages).split(1, wait) == turn


def test_one_wait_for_several_senders_splits_at_the_last() -> None:
    messages = [
        Transfer(
            sender,
            9,
            Event("send", "M2N", 0, 0, 9, 0, posted, posted + 5),
            Event("receive", "M2N", 0, 0, sender, 0, 0, seen),
        )
        for sender, posted, seen in ((0, 10, 15), (1, 20, 28), (2, 40, 50))
    ]
    assert WaitSplits(messages).split(9, _wait(0, 28)) == 20
    # one after the other: what was seen before a wait began does not count in it
    assert WaitSplits(messages).split(9, _wait(16, 28)) == 20
    assert WaitSplits(messages).split(9, _wait(29, 50)) == 40


def test_measured_chart(tmp_path: Path) -> None:
    record(tmp_path, [1, 2])
    ranks = load_traces(tmp_path)
    transfers, _ = match_transfers(ranks)
    chart = chart_of_step(ranks, transfers, find_steps(ranks)[0])
    assert chart.heading == "Measured: step 1"
    assert chart.facts == "step 200 µs"
    assert [row.label for row in chart.rows] == ["A0 rank 0", "A0 rank 0 →", "F0 rank 1 →", "F0 rank 1"]
    attention, attention_port, ffn_port, ffn = chart.rows

    def micros(row: Row) -> list[tuple[int, int, str, float, str]]:
        return [(round(b.start * 5e5), round(b.end * 5e5), b.style, b.shade, b.what) for b in row.boxes]

    assert micros(attention) == [
        (0, 20, "F", 0.0, "A(0)"),
        (20, 50, "waits", 0.0, "for N2M(0) from F0 rank 1"),
        (50, 60, "exposed", 0.0, "for N2M(0) from F0 rank 1"),
        (60, 90, "F", 1.0, "A(1) tail"),
    ]
    assert micros(attention_port) == [(20, 30, "M2N", 0.0, "M2N(0) A0 → F0 rank 1, 4096 bytes")]
    assert micros(ffn_port) == [(50, 60, "N2M", 0.0, "N2M(0) F0 → A0 rank 0, 4096 bytes")]
    assert [(b[0], b[1], b[2]) for b in micros(ffn)] == [(4, 20, "waits"), (20, 30, "exposed"), (30, 50, "F")]
    assert attention.busy() == pytest.approx(100e-6)
