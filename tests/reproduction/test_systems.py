"""Baselines on the event engine against times worked out by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_disagmoe.reproduction.constants import Constants
from megatron_disagmoe.reproduction.systems.batch_overlap import BatchOverlap
from megatron_disagmoe.reproduction.systems.catalogue import BASELINES
from megatron_disagmoe.reproduction.systems.dualpipe import DualPipe, turns
from megatron_disagmoe.reproduction.systems.layer import Parts
from megatron_disagmoe.reproduction.systems.pipeline import Do, Shape, Work, chunk_sizes, one_f_one_b, peak_live
from megatron_disagmoe.reproduction.systems.serial import Comet, Megatron, Tutel, chunked
from tests.reproduction.samples import costs, job

CONSTANTS = Constants(communication_sms=0.0)


def test_one_rank_does_everything_one_after_the_other() -> None:
    # a layer: 1 + 2 + 1 + 2 forward, 2 + 2 + 2 + 2 backward; 3 layers, 4 micro-batches
    step = Megatron(CONSTANTS).step(costs(3), Shape(1, 1, 4))
    assert step.seconds == pytest.approx(4 * 3 * (6 + 8))
    assert step.exposed == pytest.approx(4 * 3 * 8)
    assert step.busiest == pytest.approx(4 * 3 * 6)
    assert step.bubble == pytest.approx(0.0)


@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (4, 8)])
def test_plain_1f1b_has_the_known_bubble(ranks: int, micro_batches: int) -> None:
    # (n + p - 1) (F + B) with one layer a rank and no time between ranks
    step = Megatron(CONSTANTS).step(costs(ranks), Shape(ranks, 1, micro_batches))
    assert step.seconds == pytest.approx((micro_batches + ranks - 1) * 14)
    assert step.bubble == pytest.approx((ranks - 1) * 6)


def test_interleaving_divides_the_bubble_by_v() -> None:
    # Narayanan et al.: bubble (p - 1) / v of a micro-batch's time on a rank
    whole = Megatron(CONSTANTS).step(costs(16), Shape(4, 1, 16))
    halves = Megatron(CONSTANTS).step(costs(16), Shape(4, 2, 16))
    assert whole.seconds - 16 * 4 * 14 == pytest.approx(3 * 4 * 14)
    assert halves.seconds - 16 * 4 * 14 == pytest.approx(3 * 4 * 14 / 2)


def test_a_hop_delays_but_does_not_block() -> None:
    # filling and draining cross p - 1 boundaries each way
    step = Megatron(CONSTANTS).step(costs(2, hop=0.5), Shape(2, 1, 8))
    assert step.seconds == pytest.approx((8 + 1) * 14 + 2 * 0.5, abs=8 * 0.5)
    assert step.seconds > (8 + 1) * 14


def test_tutel_by_hand() -> None:
    # two chunks: dispatch 0-1, 1-2; experts 1-2, 2-3; combine 2-3, 3-4
    assert chunked(Parts(0.0, 2.0, 2.0, 2.0), 2, 0.0, 0.0, 1.0) == pytest.approx(4.0)
    # four chunks with latency 0.1: dispatch of 0.9 / 4 + 0.1
    quarter = (1.0 - 0.1) / 4 + 0.1
    assert chunked(Parts(0.0, 1.0, 0.04, 1.0), 4, 0.0, 0.1, 1.0) == pytest.approx(8 * quarter)
    # one chunk is what Megatron does
    assert chunked(Parts(0.0, 2.0, 3.0, 4.0), 1, 0.5, 0.1, 2.0) == 9.0


def test_kernels_beside_compute_slow_it_down() -> None:
    # experts of 2 take 2 / (1 - 1/2) = 4 where half the SMs are taken all the time
    assert chunked(Parts(0.0, 8.0, 2.0, 8.0), 2, 0.5, 0.0, 1.0) == pytest.approx(16.0 + 0.0, abs=2.0)
    comet = Comet(Constants(communication_sms=0.5, comet_hidden=1.0))
    # compute 2 + 2, communication 4, of which the shorter (2, the experts' own time) is hidden
    assert comet.moe_seconds(Parts(0.0, 2.0, 2.0, 2.0), job()) == pytest.approx(4 + 4 - 2)


def test_comet_hides_its_share_of_the_shorter() -> None:
    comet = Comet(Constants(communication_sms=0.0, comet_hidden=0.8))
    assert comet.moe_seconds(Parts(9.0, 2.0, 3.0, 2.0), job()) == pytest.approx(3 + 4 - 0.8 * 3)
    assert comet.moe_seconds(Parts(9.0, 0.5, 3.0, 0.5), job()) == pytest.approx(3 + 1 - 0.8 * 1)


def test_tutel_is_never_slower_than_megatron() -> None:
    ours = [system(CONSTANTS).step(costs(4), Shape(2, 2, 4)).seconds for system in (Tutel, Megatron)]
    assert ours[0] < ours[1]


def test_batch_overlap_hides_communication_behind_the_other_direction() -> None:
    # one rank: warm-up and cool-down don't overlap, all pairs do. A pair of layers has 2 + 4 compute, 8 of network.
    step = BatchOverlap(CONSTANTS).step(costs(2, transfer=1.0), Shape(1, 1, 10))
    serial = Megatron(CONSTANTS).step(costs(2, transfer=1.0), Shape(1, 1, 10))
    assert serial.seconds == 10 * 2 * 10
    # a pair: compute 6 a layer, network 4 hidden but for what cannot be: at the ends
    assert 10 * 2 * 6 < step.seconds < 10 * 2 * 6 + 2 * 8 + 10
    assert step.exposed < 0.3 * serial.exposed


@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (4, 8), (8, 16), (8, 20)])
def test_dualpipe_does_all_work_once_and_in_an_order_that_runs(ranks: int, micro_batches: int) -> None:
    shape = Shape(ranks, 1, micro_batches)
    for rank in range(ranks):
        works = [work for turn in turns(shape, rank) for work in turn.works]
        count = Counter(works)
        assert set(count.values()) == {1}
        for do in (Do.FORWARD, Do.BACKWARD):
            mine = {(work.chunk, work.micro_batch) for work in works if work.do is do}
            half = micro_batches // 2
            near = {(rank, m) for m in range(half)} | {(ranks - 1 - rank, m) for m in range(half, micro_batches)}
            assert mine == near
    assert DualPipe(CONSTANTS).step(costs(ranks), shape).seconds > 0


def test_dualpipe_bubble_is_what_its_paper_says() -> None:
    # (PP/2 - 1)(F&B + B - 3W) with F = 1 + 1, B = 4 of which W = 2, no network: (4/2 - 1)(6 + 4 - 3 * 2) = 4
    times = costs(4, transfer=0.0)
    step = DualPipe(CONSTANTS).step(times, Shape(4, 1, 16))
    assert step.seconds - 16 * 6 == pytest.approx(4, abs=2.0)


def test_live_activations_of_the_known_orders() -> None:
    # 1F1B: p - rank; interleaved: warm-up + 1
    shape = Shape(4, 1, 8)
    assert [sum(peak_live(one_f_one_b(shape, rank)).values()) for rank in range(4)] == [4, 3, 2, 1]
    interleaved = Shape(4, 2, 8)
    assert sum(peak_live(one_f_one_b(interleaved, 0)).values()) == 2 * 3 + 4 + 1
    # DualPipe: P + 1 at most, DeepSeek-V3 table 2
    dual = Shape(4, 1, 16)
    works = [work for turn in turns(dual, 0) for work in turn.works]
    assert sum(peak_live(works).values()) == 5


def test_a_split_backward_keeps_its_activation_until_its_weights() -> None:
    forward, backward, weight = (Work(do, 0, 0) for do in (Do.FORWARD, Do.BACKWARD, Do.WEIGHT))
    again = Work(Do.FORWARD, 0, 1)
    assert peak_live([forward, backward, again, weight]) == {0: 2}
    assert peak_live([forward, backward, again]) == {0: 1}


def test_the_chunk_with_the_output_layer_gets_fewer_layers() -> None:
    # a layer takes 14, the tail 3 * 9 = 27: two layers' worth
    assert chunk_sizes(costs(14, tail=9.0), 4) == [4, 4, 4, 2]
    assert chunk_sizes(costs(12), 4) == [3, 3, 3, 3]
    assert chunk_sizes(costs(5), 1) == [5]
    with pytest.raises(ValueError, match="6 chunks for 5 layers"):
        chunk_sizes(costs(5), 6)


@pytest.mark.parametrize("name", BASELINES)
def test_no_system_beats_its_own_lower_bound(name: str) -> None:
    system = BASELINES[name](Constants())
    shape = Shape(4, 1 if "dualpipe" in name else 2, 8)
    times = costs(8)
    assert system.step(times, shape).seconds >= system.least_seconds(times, shape) - 1e-9


@pytest.mark.parametrize("name", BASELINES)
def test_every_system_says_what_it_models(name: str) -> None:
    words = BASELINES[name].__doc__ or ""
    assert all(word in words for word in ("Models:", "Source:", "Simplifications:"))
