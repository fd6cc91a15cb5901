"""Bytes and times of transfers, by dispatch mode and layout, against counts by hand and over explicit seats."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from megatron_disagmoe.planner.allocation import Allocation, DispatchMode, NodeLayout
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.cluster_spec import Cluster, Network, Pool
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.hosts import Seat, seats
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.model_spec import MixtureOfExperts
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.rings import spine_load
from megatron_disagmoe.planner.routing import expected_parts
from megatron_disagmoe.planner.traffic import nic_splits
from megatron_disagmoe.schedules.actions import Side
from tests.planner.problems import allocation, problem


def _counted_parts(moe: MixtureOfExperts, parts: int) -> float:
    """The expectation over every possible choice of a token."""
    group = moe.num_experts // moe.num_groups
    found = []
    for groups in itertools.combinations(range(moe.num_groups), moe.topk_groups):
        allowed = [e for e in range(moe.num_experts) if e // group in groups]
        for chosen in itertools.combinations(allowed, moe.top_k):
            found.append(len({e // (moe.num_experts // parts) for e in chosen}))
    return sum(found) / len(found)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize(("k", "groups", "open_groups"), [(1, 1, 1), (2, 1, 1), (3, 1, 1), (2, 4, 2), (4, 2, 1)])
def test_expected_parts_by_counting(parts: int, k: int, groups: int, open_groups: int) -> None:
    moe = MixtureOfExperts(num_experts=8, top_k=k, ffn_hidden_size=1, num_groups=groups, topk_groups=open_groups)
    assert expected_parts(moe, parts) == pytest.approx(_counted_parts(moe, parts))


def test_a_token_of_qwen3_goes_to_two_of_two_nodes() -> None:
    # k = 8 over 2 nodes: both, but for 2 C(64, 8) / C(128, 8) of the tokens
    moe = load_model("qwen3-235b-a22b").moe
    assert expected_parts(moe, 2) == pytest.approx(2 * (1 - math.comb(64, 8) / math.comb(128, 8)))


ROW = 4096 * 2  # bytes of a token's hidden state, Mixtral in bf16
TOKENS = 8 * 4096  # of a micro-batch over 8 attention ranks


@pytest.mark.parametrize(
    ("mode", "rows"),
    [("per-expert", 2.0), ("per-rank", 8 * (1 - 21 / 28)), ("per-node", 1.0)],  # 1 - C(7, 2) / C(8, 2); one node
)
def test_bytes_and_time_on_separate_nodes(mode: DispatchMode, rows: float) -> None:
    e = evaluate(problem(), allocation(dispatch=mode))
    m2n = TOKENS * (rows * ROW + 2 * 8)  # beside the rows 8 bytes per (token, expert)
    rate = 8 * 400e9 / 8 * 0.86  # 8 NICs of a node, 8 GPUs of either side
    assert e.links.m2n[0] == pytest.approx(m2n / rate + 20e-6)
    assert e.links.n2m[0] == pytest.approx(TOKENS * rows * ROW / rate + 20e-6)
    assert e.links.lane[0] == pytest.approx(TOKENS * (ROW + 8 * rows) / rate + 20e-6)


def test_shared_nodes_keep_half_of_two_nodes_traffic_inside() -> None:
    apart = evaluate(problem(), allocation(attention_groups=1, ffn_groups=1, dispatch="per-expert"))
    shared = evaluate(
        problem(), allocation(attention_groups=1, ffn_groups=1, dispatch="per-expert", nodes=NodeLayout.SPREAD)
    )
    assert (shared.geometry.m2n_off[0], shared.geometry.n2m_off[0]) == (0.5, 0.5)
    # Four attention GPUs of a node have four of its NICs, as eight have eight; half of their bytes need them.
    assert shared.links.m2n[0] - 20e-6 == pytest.approx((apart.links.m2n[0] - 20e-6) / 2)


def test_handing_on_inside_a_node_can_bind() -> None:
    """Per node, one row crosses the network and N2M's sums gather over NVLink: slow NVLink shows."""
    fast = evaluate(problem(), allocation(dispatch="per-node"))
    cluster = load_cluster("h800-16x8")
    slow_pool = cluster.pools[0].model_copy(update={"nvlink_gb_per_s": 10.0})
    slow_cluster = cluster.model_copy(update={"pools": (slow_pool,)})
    slow = evaluate(problem(cluster=slow_cluster), allocation(dispatch="per-node"))
    handed_on = TOKENS * (expected_parts(load_model("mixtral-8x7b").moe, 8) - 1) * ROW / 8
    assert slow.links.m2n[0] == pytest.approx(handed_on / (10e9 * 0.765) + 20e-6)
    assert fast.links.m2n[0] < slow.links.m2n[0]


@pytest.mark.parametrize(
    ("network", "factor"),
    [
        ({"oversubscription": 4.0, "nodes_per_leaf": 32}, 1.0),  # both nodes on one leaf
        ({"oversubscription": 4.0, "nodes_per_leaf": 1}, 4.0),  # the other node is behind the spine
        ({"oversubscription": 4.0, "cross_rail_forwarding": False}, 3.5),  # 7 of 8 rails
        ({"oversubscription": 1.0, "nodes_per_leaf": 1}, 1.0),
    ],
)
def test_an_oversubscribed_spine_slows_what_climbs_to_it(network: dict[str, Any], factor: float) -> None:
    cluster = load_cluster("h800-16x8")
    spine = cluster.model_copy(update={"network": cluster.network.model_copy(update=network)})
    plain, slowed = evaluate(problem(), allocation()), evaluate(problem(cluster=spine), allocation())
    assert slowed.links.m2n[0] - 20e-6 == pytest.approx(factor * (plain.links.m2n[0] - 20e-6))


@pytest.mark.parametrize(("leaf", "factor"), [(4, 1.0), (3, 1.0), (2, 2.0), (1, 3.0)])
def test_what_a_spread_group_sends_to_other_leaves(leaf: int, factor: float) -> None:
    """Four nodes, a ratio of 3: of the three other nodes 3 - (leaf - 1) are behind the spine; one of three fits it."""
    cluster = load_cluster("h800-16x8")
    network = cluster.network.model_copy(update={"oversubscription": 3.0, "nodes_per_leaf": leaf})
    sizes = {"attention_groups": 1, "ffn_groups": 2, "attention_ranks": 16, "ffn_ranks": 8}
    a = allocation(**sizes, nodes=NodeLayout.SPREAD)
    plain = evaluate(problem(), a)
    slowed = evaluate(problem(cluster=cluster.model_copy(update={"network": network})), a)
    assert plain.geometry.m2n_span[0] == 4
    assert slowed.links.m2n[0] - 20e-6 == pytest.approx(factor * (plain.links.m2n[0] - 20e-6))


@pytest.mark.parametrize(
    ("span", "alike", "replicas", "leaf", "load"),
    [
        # 0 1 2 3 | 0 1 2 3 | ...: each of a leaf's four nodes is in a ring of its own with another leaf
        (4, 1, 4, 4, 4.0),
        (4, 4, 4, 4, 1.0),  # a leaf is one ring's: one of four nodes sends, through a quarter of the bandwidth
        (4, 2, 2, 4, 2.0),
        (2, 1, 4, 4, 2.0),  # 0 1 0 1 | 0 1 0 1
        (3, 1, 4, 4, 3.0),  # 0 1 2 0 | 1 2 0 1 | 2 0 1 2
        (3, 1, 2, 4, 2.0),  # 0 1 2 0 | 1 2: ring 0 is inside
        (2, 1, 2, 4, 0.0),  # everything on one leaf
        (8, 8, 1, 4, 1.0),  # one replica, whose copies of attention lie on two leaves
        (8, 1, 1, 4, 0.0),  # one replica with no copies
    ],
)
def test_rings_of_a_reduction_that_leave_their_leaf(
    span: int, alike: int, replicas: int, leaf: int, load: float
) -> None:
    """By hand, the ratio 4; what each node of a leaf holds is written beside."""
    network = load_cluster("h800-16x8").network
    network = network.model_copy(update={"oversubscription": 4.0, "nodes_per_leaf": leaf})
    sizes = {"span": np.array([span]), "alike": np.array([alike]), "replicas": np.array([replicas])}
    assert spine_load(network, **sizes).tolist() == [load]
    for free in ({"oversubscription": 1.0}, {"nodes_per_leaf": 0}):
        assert spine_load(network.model_copy(update=free), **sizes).tolist() == [0.0]


def test_a_reduction_takes_longer_where_it_climbs_to_the_spine() -> None:
    """Mixtral: four replicas, the experts of each on three nodes, which are a leaf; all of it climbs."""
    cluster = load_cluster("h800-16x8")
    sizes = {"attention_groups": 2, "ffn_groups": 3, "attention_ranks": 4, "ffn_ranks": 8, "replicas": 4}
    a = allocation(**sizes, nodes=NodeLayout.SEPARATE)

    def seconds(ratio: float) -> float:
        network = cluster.network.model_copy(update={"oversubscription": ratio, "nodes_per_leaf": 3})
        return evaluate(problem(cluster=cluster.model_copy(update={"network": network})), a).synchronise_seconds

    # 32 layers round three groups: 11 on the fullest, one expert of each a GPU; 2 + 4 bytes, 3 of 4 copies.
    experts = 8 * 11 * load_model("mixtral-8x7b").num_expert_parameters * (2 + 4) * 3 / 4
    rate = 8 * 400e9 / 8 * 0.86
    assert (seconds(4.0) - seconds(2.0)) * rate == pytest.approx(2 * experts)
    assert seconds(1.0) < seconds(2.0)


def test_the_busiest_ffn_rank_decides() -> None:
    even, skewed = evaluate(problem(), allocation()), evaluate(problem(imbalance=1.5), allocation())
    assert skewed.links.m2n[0] - 20e-6 == pytest.approx(1.5 * (even.links.m2n[0] - 20e-6))
    assert skewed.stages.ffn[0] > 1.3 * even.stages.ffn[0]


def _pool(nics: list[float]) -> Pool:
    return load_cluster("h800-16x8").pools[0].model_copy(update={"nics_gbit_per_s": tuple(nics)})


def test_nics_may_be_split_unevenly() -> None:
    network = load_cluster("h800-16x8").network
    splits = nic_splits(_pool([400, 100, 100]), network)
    assert [(s.attention, s.ffn, round(s.attention_rate / 0.86e9 * 8)) for s in splits] == [
        (1, 2, 100),
        (2, 1, 200),
        (1, 2, 400),
        (2, 1, 500),
    ]
    assert nic_splits(_pool([400]), network) == ()


def test_too_many_different_nics_are_refused() -> None:
    speeds = [100 + 1.0001**i for i in range(20)]
    with pytest.raises(ValueError, match="nics_gbit_per_s"):
        nic_splits(_pool(speeds), load_cluster("h800-16x8").network)


LAYOUTS = [
    # pA, pF, M, N, R, TP, layout
    (2, 2, 8, 8, 1, 1, NodeLayout.SEPARATE),
    (2, 2, 16, 8, 2, 1, NodeLayout.SEPARATE),
    (2, 2, 2, 4, 2, 1, NodeLayout.SEPARATE),
    (2, 4, 8, 4, 2, 2, NodeLayout.SEPARATE),
    (1, 1, 8, 8, 2, 1, NodeLayout.SPREAD),
    (2, 2, 4, 4, 2, 1, NodeLayout.SPREAD),
    (1, 1, 12, 4, 2, 1, NodeLayout.SPREAD),
    (2, 2, 8, 8, 2, 1, NodeLayout.PAIRED),
    (2, 4, 4, 4, 2, 2, NodeLayout.PAIRED),
    (4, 4, 2, 2, 2, 1, NodeLayout.PAIRED),
    (2, 2, 2, 2, 4, 1, NodeLayout.PAIRED),
    (2, 2, 1, 1, 2, 1, NodeLayout.SPREAD),
    (1, 2, 2, 1, 4, 1, NodeLayout.SPREAD),
]


@pytest.mark.parametrize(("pa", "pf", "m", "n", "r", "tp", "nodes"), LAYOUTS)
def test_what_leaves_a_node_by_counting_seats(
    pa: int, pf: int, m: int, n: int, r: int, tp: int, nodes: NodeLayout
) -> None:
    a = allocation(
        attention_groups=pa, ffn_groups=pf, attention_ranks=m, ffn_ranks=n, replicas=r, tensor_parallel=tp, nodes=nodes
    )
    planned: Problem = problem(batch=3 * 2048)
    e = evaluate(planned, a)
    assert e.geometry.fits[0]
    counted = _counted(a, planned.cluster, planned.num_layers)
    assert (e.geometry.m2n_off[0], e.geometry.n2m_off[0], e.geometry.lane_off[0]) == pytest.approx(counted)


def _counted(a: Allocation, cluster: Cluster, layers: int) -> tuple[float, float, float]:
    """Mean share of (sender, receiver) pairs on different nodes: M2N, N2M, lane."""
    at: dict[tuple[Side, int, int], list[Seat]] = {}
    taken = set()
    for seat in seats(a, cluster, num_layers=layers):
        at.setdefault((seat.group.side, seat.group.index, seat.replica), []).append(seat)
        assert (seat.node, seat.gpu) not in taken
        assert seat.gpu < 8
        taken.add((seat.node, seat.gpu))

    def off(senders: list[Seat], receivers: list[Seat], *, lane: bool = False) -> float:
        pairs = [(s.node, t.node) for s in senders for t in receivers if not lane or s[3:5] == t[3:5]]
        return sum(s != t for s, t in pairs) / len(pairs)

    shares: list[list[float]] = [[], [], []]
    for replica in range(a.replicas):
        # whole rounds of both depths, the hand-over from the last group to the first among them
        for i in range(math.lcm(a.attention_groups, a.ffn_groups)):
            here = at[Side.A, i % a.attention_groups, replica]
            there = at[Side.A, (i + 1) % a.attention_groups, replica]
            experts = at[Side.F, i % a.ffn_groups, replica]
            shares[0].append(off(here, experts))
            shares[1].append(off(experts, there))
            shares[2].append(off(here, there, lane=True))
    return float(np.mean(shares[0])), float(np.mean(shares[1])), float(np.mean(shares[2]))


def test_ranks_are_numbered_as_the_topology_numbers_them() -> None:
    from megatron_disagmoe.topology import Topology

    a = allocation(attention_groups=2, ffn_groups=2, attention_ranks=2, ffn_ranks=4, replicas=2)
    planned = problem()
    topology = Topology(evaluate(planned, a).placement, attention_ranks=2, ffn_ranks=4, replicas=2)
    for seat in seats(a, planned.cluster, num_layers=32):
        role = topology.role(seat.rank)
        assert (role.group, role.replica, role.index) == (seat.group, seat.replica, seat.number)


def test_a_network_is_needed_between_nodes() -> None:
    network = Network(efficiency=1, latency_us=1, local_latency_us=1, rail_optimised=False)
    with pytest.raises(ValueError, match="nics_gbit_per_s"):
        Cluster(name="x", pools=(_pool([]),), network=network, storage_gb_per_s=1)
