from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_disagmoe.schedules.actions import Action, Kind
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate
from megatron_disagmoe.tracing.merge import load_traces, match_transfers
from megatron_disagmoe.tracing.predicted import describes, fit_costs, load_costs, load_schedule, save_costs
from megatron_disagmoe.tracing.recorder import TraceRecorder
from megatron_disagmoe.tracing.report import find_steps
from tests.tracing.traces import A0, F0, MICRO, record, schedule


def _fitted(directory: Path) -> StageCosts:
    ranks = load_traces(directory)
    transfers, _ = match_transfers(ranks)
    return fit_costs(ranks, transfers, find_steps(ranks))


def test_costs_are_fitted(tmp_path: Path) -> None:
    record(tmp_path, [7, 2, 2])
    costs = _fitted(tmp_path)
    assert dataclasses.asdict(costs) == pytest.approx(
        dataclasses.asdict(
            StageCosts(attention=40e-6, ffn=40e-6, tail=60e-6, transfer=20e-6, combine=20e-6, backward_ratio=0.0)
        )
    )
    assert simulate(schedule(), costs).makespan == pytest.approx(180e-6)


@pytest.mark.parametrize(
    "kinds, backward_ratio, weight_fraction",
    [
        ({Kind.B: 50}, 2.5, 0.5),
        ({Kind.I: 30, Kind.W: 10}, 2.0, 0.25),
    ],
)
def test_backward_and_embedding_are_fitted(
    tmp_path: Path, kinds: dict[Kind, int], backward_ratio: float, weight_fraction: float
) -> None:
    with TraceRecorder(0, A0, tmp_path) as a, TraceRecorder(1, F0, tmp_path) as f:
        now = 0
        for recorder, stages in ((a, {0: 25, 1: 20, 2: 15}), (f, {0: 10, 1: 30})):
            for layer, forward in stages.items():
                for kind, took in {
                    Kind.F: forward,
                    **{kind: took * forward // 20 for kind, took in kinds.items()},
                }.items():
                    recorder.compute(Action(kind, layer, 0), now, now + took * MICRO)
                    now += took * MICRO
        a.step(0, 0, now)
        f.step(0, 0, now)
    costs = _fitted(tmp_path)
    assert costs.attention == pytest.approx(20e-6)
    assert costs.embedding == pytest.approx(5e-6)
    assert costs.tail == pytest.approx(15e-6)
    assert costs.ffn == pytest.approx(20e-6)  # the median of 10 and 30
    # times are whole microseconds, so stages of 25 and 15 round a little
    assert costs.backward_ratio == pytest.approx(backward_ratio, rel=0.02)
    assert costs.weight_fraction == pytest.approx(weight_fraction, rel=0.02)
    assert (costs.transfer, costs.combine, costs.lane) == (0.0, 0.0, 0.0)


def test_forwards_that_are_run_again_are_not_counted_as_backward(tmp_path: Path) -> None:
    """The FFN stage's backward is 20 of forward and 40 of gradients; the simulator adds the 20 itself."""
    with TraceRecorder(0, A0, tmp_path) as a, TraceRecorder(1, F0, tmp_path) as f:
        for recorder, now, backward in ((a, 0, 40), (f, 100, 60)):
            recorder.compute(Action(Kind.F, 0, 0), now * MICRO, (now + 20) * MICRO)
            recorder.compute(Action(Kind.B, 0, 0), (now + 200) * MICRO, (now + 200 + backward) * MICRO)
        a.compute(Action(Kind.D, 0, 0), 150 * MICRO, 150 * MICRO)
        a.send("AGAIN", 0, 0, 1, 150 * MICRO, 160 * MICRO, 4096)
        f.receive("AGAIN", 0, 0, 0, 140 * MICRO, 160 * MICRO, 4096)
        a.step(0, 0, 400 * MICRO)
        f.step(0, 0, 400 * MICRO)
    costs = _fitted(tmp_path)
    assert costs.backward_ratio == pytest.approx(2)
    assert costs.recompute_ffn == 0
    assert costs.dispatched_again(1, num_layers=1) == pytest.approx(20e-6)


def test_a_transfer_that_nobody_awaited_is_known_by_its_shortest(tmp_path: Path) -> None:
    with TraceRecorder(0, A0, tmp_path) as a, TraceRecorder(1, F0, tmp_path) as f:
        a.compute(Action(Kind.F, 0, 0), 0, 10)
        f.compute(Action(Kind.F, 0, 0), 50, 60)
        for micro_batch, seen in enumerate((40, 25, 90)):
            a.send("M2N", 0, micro_batch, 1, 10, 10)  # never seen complete
            f.receive("M2N", 0, micro_batch, 0, 5, seen)
            f.wait("M2N", 0, micro_batch, 0, seen - 1, seen)  # it was there already
        a.step(0, 0, 100)
        f.step(0, 0, 100)
    assert _fitted(tmp_path).transfer == pytest.approx(15e-9)


def test_sides_without_work_cannot_be_fitted(tmp_path: Path) -> None:
    with TraceRecorder(0, A0, tmp_path) as a:
        a.compute(Action(Kind.F, 0, 0), 0, 10)
        a.step(0, 0, 10)
    with pytest.raises(ValueError, match="no forward stage of one of the sides"):
        _fitted(tmp_path)


def test_a_schedule_describes_what_ran(tmp_path: Path) -> None:
    record(tmp_path, [1])
    ranks = load_traces(tmp_path)
    (step,) = find_steps(ranks)
    assert describes(schedule(), ranks, step)
    fewer = dataclasses.replace(schedule(), actions={**schedule().actions, F0: ()})
    assert not describes(fewer, ranks, step)
    swapped = dataclasses.replace(schedule(), actions={**schedule().actions, A0: schedule().actions[A0][::-1]})
    assert not describes(swapped, ranks, step)


def test_files_beside_the_traces(tmp_path: Path) -> None:
    assert load_costs(tmp_path) is None
    assert load_schedule(tmp_path) is None
    costs = StageCosts(attention=1.0, ffn=0.5, transfer=0.25, lane=0.125)
    save_costs(costs, tmp_path)
    assert load_costs(tmp_path) == costs
    for wrong in ("{}", "[1]", '{"attention": -1, "ffn": 1, "transfer": 1}', "nothing"):
        (tmp_path / "costs.json").write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=r"costs\.json does not hold the costs of stages"):
            load_costs(tmp_path)
    (tmp_path / "costs.json").write_text(json.dumps({"attention": 1, "ffn": 1, "transfer": 0, "colour": 1}))
    with pytest.raises(ValueError, match="colour"):
        load_costs(tmp_path)
