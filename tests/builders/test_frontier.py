"""The frontier between step time and live activations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_disagmoe import builders
from megatron_disagmoe.builders.frontier import LEVERS, Point, default_caps, frontier
from megatron_disagmoe.drawing.frontier import draw_frontier
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.simulator.costs import StageCosts

PLACEMENT = Placement.round_robin(num_layers=4, num_attention_groups=2, num_ffn_groups=2)
COSTS = StageCosts(attention=1, ffn=1, transfer=0.5)


@pytest.fixture(scope="module")
def points() -> list[Point]:
    caps = (3, 5, 17)
    return list(frontier(PLACEMENT, kind="interleaved-1f1b", num_micro_batches=8, costs=COSTS, caps=caps))


def test_every_lever_at_every_cap(points: list[Point]) -> None:
    assert Counter(point.lever for point in points) == dict.fromkeys(LEVERS, 3)
    for point in points:
        assert point.bound <= point.makespan * (1 + 1e-9)
        assert max(point.live_attention, point.live_ffn) <= point.max_live
        assert point.as_json()["makespan_over_bound"] == point.makespan / point.bound
    for lever in LEVERS:
        times = [point.makespan for point in points if point.lever == lever]
        assert times == sorted(times, reverse=True)


def test_levers_cost_time_and_save_memory(points: list[Point]) -> None:
    slow = {point.lever: point for point in points if point.max_live == 3}
    # one micro-batch at a time: 4 layers' forward and backward, 16 transfers; running stages again adds theirs
    one = 4 * 2 * 3 + 16 * 0.5
    assert slow["plain"].makespan <= 8 * one
    assert slow["recompute-ffn"].makespan > slow["plain"].makespan
    assert slow["recompute"].makespan > slow["recompute-ffn"].makespan
    assert slow["plain"].live_ffn > 1
    assert slow["re-dispatch"].live_ffn == 1


def test_messages_in_order() -> None:
    """Never slower, second dispatches included."""
    slow = StageCosts(attention=1, ffn=1, transfer=1.5)
    plain, ordered = (
        list(
            frontier(
                PLACEMENT,
                kind="interleaved-1f1b",
                num_micro_batches=8,
                costs=slow,
                caps=(8,),
                levers=("plain", "re-dispatch"),
                order_messages=order,
            )
        )
        for order in (False, True)
    )
    assert plain[0].makespan > ordered[0].makespan >= ordered[0].bound
    assert plain[1].makespan > ordered[1].makespan >= ordered[1].bound


def test_default_caps_reach_from_the_least_to_four_layers() -> None:
    caps = default_caps(PLACEMENT)
    assert (caps[0], caps[-1]) == (builders.least_live(PLACEMENT), 16)
    assert caps == sorted(set(caps))


def test_bad_levers_and_caps() -> None:
    with pytest.raises(ValueError, match="there is no lever 'magic'"):
        list(frontier(PLACEMENT, kind="sequential", num_micro_batches=2, costs=COSTS, caps=(3,), levers=("magic",)))
    with pytest.raises(ValueError, match="needs 3"):
        list(frontier(PLACEMENT, kind="sequential", num_micro_batches=2, costs=COSTS, caps=(2,)))


@pytest.mark.parametrize("suffix, begins", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_drawing(points: list[Point], tmp_path: Path, suffix: str, begins: bytes) -> None:
    path = tmp_path / f"frontier.{suffix}"
    draw_frontier(points, path, heading="two groups")
    first = path.read_bytes()
    assert first.startswith(begins)
    draw_frontier(points, path, heading="two groups")
    assert path.read_bytes() == first
    if suffix == "svg":
        for lever in LEVERS:
            assert lever.encode() in first


def test_drawing_refuses(points: list[Point], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot draw f\.gif"):
        draw_frontier(points, tmp_path / "f.gif", heading="")
    with pytest.raises(ValueError, match="at least one point"):
        draw_frontier([], tmp_path / "f.png", heading="")
