"""The paper's AF-pipe, and what lies beyond it: by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure as Picture

from megatron_disagmoe.builders.placement import busiest_attention
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import ScheduleKind
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.space import FFN_LEVERS
from megatron_disagmoe.planner.states import attention_parameters
from megatron_disagmoe.reproduction.beyond import run as beyond
from megatron_disagmoe.reproduction.beyond import study
from megatron_disagmoe.reproduction.beyond.picture import crossings, draw
from megatron_disagmoe.reproduction.beyond.points import BASE, Point, points, studies, zipf_imbalance
from megatron_disagmoe.reproduction.beyond.run import Outcome, with_slow_gpu
from megatron_disagmoe.reproduction.constants import Constants
from megatron_disagmoe.reproduction.systems.af_build import build
from megatron_disagmoe.reproduction.systems.af_paper import Evaluated, Shape
from megatron_disagmoe.reproduction.systems.af_pipe import slowed_cluster
from megatron_disagmoe.reproduction.systems.af_search import best_paper, bound_seconds, by_bound, chosen, placed, run
from megatron_disagmoe.reproduction.systems.af_shapes import shapes
from megatron_disagmoe.reproduction.systems.choose import Task
from megatron_disagmoe.reproduction.systems.result import Result
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.verifier import verify


@pytest.fixture(scope="module")
def task() -> Task:
    """DeepSeek-MoE at 4K with few sequences, as shipped."""
    return Task(load_model("deepseek-moe-16b"), load_cluster("h800-16x8"), 4096, 256, Constants())


def test_transfers_of_a_block_on_one_node(task: Task) -> None:
    found = Evaluated(task, Shape(2, 4, 4, 8))
    m2n, n2m, lane = found.transfers
    row, rows = 2048 * 2, 4 * 4096 * 6
    # M2N stays inside: 4 GPUs at 200 GB/s x 0.765, a probability and an index beside each row
    assert m2n == pytest.approx((rows * row + rows * 8) / 4 / (200e9 * 0.765) + 10e-6)
    # N2M leaves for the next block's node over half of the node's NICs
    assert n2m == pytest.approx(rows * row / (4 * 50e9 * 0.86) + 20e-6)
    # residual and shared experts' output, and an index a row
    assert lane == pytest.approx((2 * 4 * 4096 * row + rows * 8) / (4 * 50e9 * 0.86) + 20e-6)


def test_a_block_over_two_nodes_keeps_half_of_m2n_inside(task: Task) -> None:
    m2n, n2m, _ = Evaluated(task, Shape(2, 8, 8, 4)).transfers
    assert (n2m - 20e-6) / (m2n - 20e-6) == pytest.approx(2 / (1 + 8 / 4096), rel=1e-6)


def test_nics_of_a_ratio_stay_16_to_16(task: Task) -> None:
    even, fewer = (Evaluated(task, Shape(2, 16, n, 2, nics=16)) for n in (16, 10))
    assert even.transfers == fewer.transfers
    assert float(fewer.ffn.forward) > 1.5 * float(even.ffn.forward)


def test_a_reduction_climbs_to_the_spine(task: Task) -> None:
    """Two blocks of two nodes, four replicas, a leaf each: of experts four rings leave it, of attention two."""

    def seconds(ratio: float) -> float:
        network = task.cluster.network.model_copy(update={"oversubscription": ratio, "nodes_per_leaf": 4})
        there = replace(task, cluster=task.cluster.model_copy(update={"network": network}))
        return Evaluated(there, Shape(2, 8, 8, 4)).synchronise_seconds

    found = Evaluated(task, Shape(2, 8, 8, 4))
    rate = 8 * 50e9 * 0.86
    experts = 14 * 64 / 8 * 3 * 2048 * 1408 * (2 + 4) * 3 / 4 * 4  # 27 layers over two groups; four FFN GPUs a node
    attention = found.held * (2 + 4) * 31 / 32
    # At 8:1 experts take 8 x 4/4 and attention 8 x 2/4 of what NICs alone take.
    assert (seconds(16.0) - seconds(8.0)) * rate == pytest.approx(8 * experts + 4 * attention)
    assert seconds(1.0) < seconds(8.0)


def test_uneven_experts_count_the_fullest_rank(task: Task) -> None:
    # 64 experts on 10 ranks: 7 on the fullest, 6.4 in the mean
    assert Evaluated(task, Shape(2, 16, 10, 2)).uneven == pytest.approx(7 / 6.4)


def test_memory_of_both_sides_by_hand(task: Task) -> None:
    shape = Shape(3, 4, 4, 8, recompute_attention=Recompute.FULL, ffn_lever=FFN_LEVERS[2])
    (_, a_kept), (f_fixed, f_kept) = Evaluated(task, shape).fixed_and_kept()
    assert a_kept == pytest.approx(4096 * 2048 * 2, rel=0.05)  # a layer's input; one stage holds the dense layer
    assert f_kept == pytest.approx(4096 * 6 * (2048 * 2 + 8))
    experts = 9 * 16 * 3 * 2048 * 1408  # 27 layers over 3 groups, 64 experts over 4 ranks
    assert f_fixed > experts * (6 + 12 / 8)
    assert f_fixed < experts * (6 + 12 / 8) + 6e9


@pytest.mark.parametrize("kind", ["interleaved-1f1b", "split-backward"])
def test_schedules_are_safe_and_within_their_cap(task: Task, kind: ScheduleKind) -> None:
    shape = replace(Shape(2, 4, 4, 8), kind=kind)
    found = Evaluated(task, shape)
    found.most_live = 60
    schedule = build(found)
    assert schedule is not None
    assert verify(schedule, max_live=60).ok
    assert max(peak_live(schedule).values()) <= 60
    result = run(found)
    assert result is not None
    assert result.step_seconds >= bound_seconds(found) - 1e-9
    found.most_live = 13  # one micro-batch keeps 14 alive on the fullest group
    assert build(found) is None


def test_the_best_is_at_least_as_good_as_each(task: Task) -> None:
    some = (Shape(1, 8, 8, 8), Shape(2, 4, 4, 8), Shape(1, 16, 8, 4))
    best = best_paper(task, possible=some)
    alone = [best_paper(task, possible=[shape]) for shape in some]
    assert best is not None
    assert best.step_seconds == min(each.step_seconds for each in alone if each is not None)


def test_sequences_are_cut_only_where_nothing_else_fits(task: Task) -> None:
    some = list(shapes(task))
    assert {each.gpus_per_rank for each in some} == {1, 2, 4, 8}
    assert {each.shape.gpus_per_rank for _, each in chosen(task, some)} == {1}
    free = replace(task, constants=Constants(free_cuts=1))
    assert len({each.shape.gpus_per_rank for _, each in chosen(free, some)}) > 1


def test_fewer_sms_slow_compute(task: Task) -> None:
    slow = replace(task, cluster=slowed_cluster(task.cluster, 0.2))
    fast, slower = (Evaluated(each, Shape(2, 4, 4, 8)) for each in (task, slow))
    assert float(slower.ffn.forward) == pytest.approx(float(fast.ffn.forward) / 0.8)
    assert slower.transfers == fast.transfers


def test_a_slow_gpu_slows_the_step_by_at_most_its_factor(task: Task) -> None:
    found = Evaluated(task, Shape(2, 4, 4, 8))
    result = run(found)
    assert result is not None
    slow = with_slow_gpu(result, found, 1.5)
    assert result.step_seconds < slow.step_seconds < 1.5 * result.step_seconds + 1e-9


def test_zipf_by_hand() -> None:
    assert zipf_imbalance(64, 16, 0.0) == pytest.approx(1.0)
    # loads 1, 1/2, 1/3, 1/4 on two ranks, back and forth: 1 + 1/4 against 1/2 + 1/3
    assert zipf_imbalance(4, 2, 1.0) == pytest.approx(1.25 / ((1.25 + 5 / 6) / 2))


def test_fewer_layers_lie_beside_a_long_output_layer(task: Task) -> None:
    found = Evaluated(task, Shape(4, 4, 4, 4))
    ways = [found, *placed(found)]
    assert ways[0].placement == found.placement
    assert len({each.placement for each in ways}) == len(ways) > 1
    beside = [each.placement.attention[:-1].count(each.placement.attention[-1]) for each in ways]
    assert beside[1] < beside[0]
    work = [busiest_attention(each.placement, found.costs) for each in ways]
    assert min(work) == work[1] < work[0]
    bounds = [bound for bound, _ in by_bound(ways)]  # here the network binds, so layers in turn may have the lowest
    assert bounds == sorted(bounds)
    assert list(placed(Evaluated(task, Shape(1, 4, 4, 4)))) == []  # one group has them all


def test_parameters_follow_the_placement(task: Task) -> None:
    in_turn, placed_for_tail = (Evaluated(task, Shape(3, 4, 4, 4, tail_share=share)) for share in (0.0, 1.0))
    parameters = attention_parameters(task.model)
    for each in (in_turn, placed_for_tail):
        assert each.held == parameters.of_placement(each.placement.attention, tensor_parallel=1).max()
    assert in_turn.held != placed_for_tail.held


def test_points_say_what_they_vary() -> None:
    by_study = studies()
    assert {"length at 14 bytes", "levers", "nodes", "NIC Gbit/s", "spine", "one slow GPU"} <= set(by_study)
    assert not any("," in name for name in by_study)  # names with commas between them are asked for
    assert len({(p.study, p.x, p.series) for p in points()}) == len(list(points()))
    assert replace(BASE, nic_gbit=100.0).cluster().pools[0].nics_gbit_per_s == (100.0,) * 8
    assert replace(BASE, nodes=64).task().batch == 4 * 64 * 8


def test_points_alike_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_point(point: Point) -> Outcome:
        asked.append(point)
        return Outcome(point, {}, 1.0)

    monkeypatch.setattr(beyond, "run_point", run_point)
    nic = [point for point in studies()["NIC Gbit/s"] if point.bytes_per_parameter == 14]
    both = [*nic, *(point for point in studies()["nodes"] if point.bytes_per_parameter == 14)]
    done: list[Outcome] = []
    outcomes = beyond.run_all(both, processes=1, done=done.append)
    assert [each.point for each in outcomes] == both
    assert len(asked) == len(done) == len(both) - 1  # 16 nodes with 400 Gbit/s are in both


def test_a_run_that_was_cut_off_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def run_point(point: Point) -> Outcome:
        asked.append(point)
        return replace(outcome("x", 1.2 if point.slow == 1 else 0.9, None), point=point)

    monkeypatch.setattr(beyond, "run_point", run_point)
    whole = study.run(("one slow GPU",), tmp_path, processes=1)
    cases = json.loads((tmp_path / "cases.json").read_text())
    assert len(cases) == len(asked) == 3
    (tmp_path / "cases.json").write_text(json.dumps(cases[:1]))
    assert study.run(("one slow GPU",), tmp_path, processes=1, resume=True) == whole
    assert len(asked) == 5
    (tmp_path / "cases.json").write_text('[{"point": {}}]')
    with pytest.raises(ValueError, match="leave --resume out"):
        study.run(("one slow GPU",), tmp_path, processes=1, resume=True)


def outcome(x: str, ratio: float, at: float | None, model: str = "qwen3-235b-a22b") -> Outcome:
    """AF-pipe ``ratio`` times as fast as the rival; Megatron fits nowhere."""
    result = Result("s", ratio, ratio, 0, 0, 0, tokens=1, num_gpus=1)
    ours = Result("af-pipe", 1.0, 1.0, 0, 0, 0, tokens=1, num_gpus=1)
    both: dict[str, Result | None] = {"af-pipe": ours, "dualpipe-per-node": result, "megatron-1f1b": None}
    return Outcome(Point("length", x, model, at=at), both, 1.0)


def test_crossings_lie_between_neighbours_of_a_series() -> None:
    gains = (("4K", 1.2, 4096), ("8K", 1.1, 8192), ("16K", 1 / 1.1, 16384), ("32K", 0.8, 32768))
    at = [outcome(*each) for each in gains]
    other = [outcome("4K", 0.9, 4096, "deepseek-v3"), outcome("8K", 0.8, 8192, "deepseek-v3")]
    (found,) = crossings([*at, *other])
    assert (found.over, found.between) == ("dualpipe-per-node", ("8K", "16K"))
    assert found.at == pytest.approx(8192 * 2**0.5)  # as far above 1 as below, on logarithmic scales
    assert at[0].over_megatron == 0.0
    (linear,) = crossings([outcome("0", 1.1, 0.0), outcome("1", 1 / 1.1, 1.0)])
    assert linear.at == pytest.approx(0.5)
    (named,) = crossings([outcome("1:1", 1.1, None), outcome("2:1", 0.9, None)])
    assert named.at is None


def test_the_picture_has_a_line_for_every_crossing() -> None:
    picture = Picture()
    draw({"length": [outcome("4K", 1.2, 4096), outcome("16K", 0.8, 16384)]}, picture)
    axis = picture.axes[0]
    upright = [line for line in axis.lines if line.get_linestyle() == "--"]
    (crossing,) = crossings([outcome("4K", 1.2, 4096), outcome("16K", 0.8, 16384)])
    assert crossing.at is not None
    assert 4096 < crossing.at < 16384
    assert [np.asarray(line.get_xdata())[0] for line in upright] == [pytest.approx(math.log(crossing.at / 4096, 4))]
