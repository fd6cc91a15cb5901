"""A co-located layer, calibration, memory: by hand."""

from __future__ import annotations

import dataclasses
from math import comb

import pytest

from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.states import state_level
from megatron_disagmoe.reproduction.constants import ORIGINS, SETTINGS, Constants
from megatron_disagmoe.reproduction.hardware import CLUSTER, calibrate, shares
from megatron_disagmoe.reproduction.published import FIG5, FIG6A
from megatron_disagmoe.reproduction.systems.choose import Task, best, cuts, fitting, run, ways
from megatron_disagmoe.reproduction.systems.dualpipe import DualPipePerNode
from megatron_disagmoe.reproduction.systems.layer import Job, Keep, all_to_all_seconds, costs_of
from megatron_disagmoe.reproduction.systems.memory import Held, held, state_bytes, synchronise_seconds
from megatron_disagmoe.reproduction.systems.pipeline import Shape, chunk_sizes
from megatron_disagmoe.reproduction.systems.serial import Megatron
from tests.reproduction.samples import costs, job


def test_all_to_all_over_two_nodes_by_hand() -> None:
    # 4096 tokens x 8 rows x 4096 numbers x 2 bytes, half of it off the node at 50 GB/s x 0.86
    qwen = Job(load_model("qwen3-235b-a22b"), load_cluster(CLUSTER), 4096, 1, 16)
    seconds = 4096 * 8 * 4096 * 2 / 2 / (50e9 * 0.86) + 20e-6
    assert all_to_all_seconds(qwen, rows=8) == pytest.approx(seconds)
    slower = dataclasses.replace(qwen, nccl=0.5)
    assert all_to_all_seconds(slower, rows=8) == pytest.approx(2 * (seconds - 20e-6) + 20e-6)


def test_all_to_all_inside_a_node_takes_nvlink() -> None:
    # 7 of 8 rows leave the GPU, at 200 GB/s x 0.765
    qwen = Job(load_model("qwen3-235b-a22b"), load_cluster(CLUSTER), 4096, 1, 8)
    assert all_to_all_seconds(qwen, rows=8) == pytest.approx(4096 * 8 * 4096 * 2 * 7 / 8 / (200e9 * 0.765) + 10e-6)


def test_one_copy_a_node_sends_two_rows_instead_of_eight() -> None:
    qwen = Job(load_model("qwen3-235b-a22b"), load_cluster(CLUSTER), 4096, 1, 16)
    mine = DualPipePerNode(Constants()).job(qwen)
    assert (mine.dispatch, mine.nccl) == ("per-node", 1.0)
    many, few = (costs_of(each).layers[0].forward.combine for each in (qwen, mine))
    nodes = 2 * (1 - comb(64, 8) / comb(128, 8))
    ranks = 16 * (1 - comb(120, 8) / comb(128, 8))
    # off the node go half of two rows; NVLink has the other half and fans out to the other ranks, and takes longer
    assert 4096 * nodes / 2 * 8192 / (50e9 * 0.86) < few
    assert few == pytest.approx(4096 * (nodes / 2 + ranks - nodes) * 8192 / (200e9 * 0.765) + 20e-6)
    assert 2.4 < many / few < 2.6


def test_recomputation_adds_what_it_runs_again() -> None:
    everything, whole = (costs_of(dataclasses.replace(job(), keep=keep)).layers[3] for keep in (Keep.ALL, Keep.INPUT))
    assert everything.again.compute == everything.again.communication == 0
    assert whole.again.communication == pytest.approx(whole.forward.communication)
    assert whole.again.ffn == pytest.approx(whole.forward.ffn, rel=0.2)
    assert whole.kept == 4096 * 2048 * 2 < everything.kept / 5


def test_only_two_factors_are_fitted_and_the_shares_come_near() -> None:
    found = calibrate(Constants())
    assert (found.attention, found.ffn) == pytest.approx((1.260, 0.759), abs=2e-3)
    model = load_model(SETTINGS["fig6a"].model)
    for sequence, (attention, ffn) in FIG6A.items():
        ours = shares(Job(model, found.cluster(), sequence, 1, 16, nccl=1 / 1.1))
        assert ours.attention == pytest.approx(attention, rel=0.11)
        assert ours.ffn == pytest.approx(ffn, rel=0.09)
    eight = Job(model, found.cluster(), 4096, 1, 64, nccl=found.eight_nodes / 1.1)
    assert shares(eight).communication == pytest.approx(FIG5[8], abs=1e-6)


def test_parameters_of_a_rank_add_up_to_the_model() -> None:
    model = load_model("qwen3-235b-a22b")
    costs = costs_of(Job(model, load_cluster(CLUSTER), 4096, 1, 16))
    shape = Shape(4, 2, 8)
    parts = held(costs, shape, chunk_sizes(costs, shape.chunks), copies=1)
    total = sum(each.dense for each in parts) + 16 * sum(each.experts for each in parts)
    assert total == pytest.approx(model.num_parameters)
    both = held(costs, shape, chunk_sizes(costs, shape.chunks), copies=2)
    assert sum(each.experts for each in both) == pytest.approx(2 * sum(each.experts for each in parts))


def test_the_optimizers_state_is_shared_over_copies() -> None:
    costs = costs_of(Job(load_model("qwen3-235b-a22b"), load_cluster(CLUSTER), 4096, 1, 16))
    part = held(costs, Shape(8, 1, 8), chunk_sizes(costs, 8), copies=1)[1]
    whole = state_bytes(part, state_level("bf16", 18), dense_copies=1, expert_copies=1)
    assert whole == pytest.approx(18 * (part.dense + part.experts))
    shared = state_bytes(part, state_level("bf16", 18), dense_copies=4, expert_copies=2)
    assert shared == pytest.approx((6 + 3) * part.dense + (6 + 6) * part.experts)


def test_the_search_keeps_within_memory_and_takes_the_fastest() -> None:
    task = Task.usual(load_model("deepseek-moe-16b"), calibrate(Constants()).cluster(), 4096, Constants())
    system = Megatron(task.constants)
    every = [each for way in ways(system, task, [(1, 1)]) if (each := fitting(system, task, way))]
    assert all(each.peak <= 80e9 for each in every)
    found = best(system, task)
    assert found is not None
    assert found.tokens == 4 * 128 * 4096
    assert found.step_seconds == min(run(system, task, each).step_seconds for each in every)


def test_cuts_of_both_kinds_share_a_sequence_among_8_at_most() -> None:
    task = Task.usual(load_model("qwen3-235b-a22b"), load_cluster(CLUSTER), 4096, Constants())
    # four key/value heads: tensor parallelism of 4 at most
    assert set(cuts(task)) == {(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)}


def test_nothing_fits_where_memory_is_too_small() -> None:
    task = Task.usual(load_model("deepseek-v3"), load_cluster(CLUSTER), 4096, Constants(bytes_per_parameter=18))
    assert best(Megatron(task.constants), task) is None


def test_every_constant_has_a_range_around_it_and_a_reason() -> None:
    for name, origin in ORIGINS.items():
        assert origin.low <= getattr(Constants(), name) <= origin.high, name
        assert origin.reason
        assert origin.source
    changed = Constants().with_("tutel_most_chunks", 4.0)
    assert changed.tutel_most_chunks == 4
    assert isinstance(changed.tutel_most_chunks, int)
    with pytest.raises(ValueError, match="no constant 'speed'"):
        Constants().with_("speed", 1)


def test_a_baselines_reduction_climbs_to_the_spine_as_ours_does() -> None:
    """By hand: EP 16 is two nodes, so of experts with four copies a leaf of two nodes has two rings that leave it."""

    def seconds(ratio: float, held: Held) -> float:
        cluster = job().cluster
        network = cluster.network.model_copy(update={"oversubscription": ratio, "nodes_per_leaf": 2})
        on_spine = dataclasses.replace(job(), cluster=cluster.model_copy(update={"network": network}))
        known = dataclasses.replace(costs(1), job=on_spine)
        return synchronise_seconds(known, [held], state=state_level("bf16", 18), replicas=4, copies=1)

    rate = 8 * 400e9 / 8 * 0.86
    experts, dense = Held(dense=0.0, experts=1e9), Held(dense=1e9, experts=0.0)
    once = 1e9 * 6 * 3 / 4 * 8 / rate  # eight GPUs of a node each with experts of its own
    assert seconds(4.0, experts) - seconds(1.0, experts) == pytest.approx(3 * once)
    # Dense parameters are the same on both nodes of a leaf: one ring leaves it, over two nodes' rate by the ratio.
    once = 1e9 * 6 * 63 / 64 / rate
    assert seconds(16.0, dense) - seconds(8.0, dense) == pytest.approx((8 - 4) * once)
    assert seconds(2.0, dense) == seconds(1.0, dense), "NVLink takes longer"
