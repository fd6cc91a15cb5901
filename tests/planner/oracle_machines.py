"""Where groups lie and what travels between them, in plain Python: half of the planner's oracle."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from megatron_disagmoe.planner.allocation import Allocation, NodeLayout
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.routing import expected_parts

#: Seconds of M2N, N2M, lane and packing; bytes of a message on A and F GPUs and of a lane.
Transfers = tuple[float, float, float, float, float, float, float]


@dataclass(frozen=True)
class Nodes:
    """Where groups lie; ``ffn_nodes`` 0 where a group's nodes hold different numbers of its ranks."""

    a_per_node: float
    f_per_node: float
    m2n: float
    n2m: float
    lane: float
    ffn_nodes: int
    m2n_span: float
    n2m_span: float


class Machines:
    """The nodes and links of one problem, all on one pool of the cluster."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.pool, self.network = problem.attention_pool, problem.cluster.network
        self.gpu = self.pool.gpu
        self.width = self.gpu.bytes_per_number

    def nodes_of(self, a: Allocation, layout: NodeLayout) -> Nodes | None:
        """Where the groups lie; None where the layout has no place for them."""
        return self.separate(a) if layout is NodeLayout.SEPARATE else self.shared(a, layout)

    def separate(self, a: Allocation) -> Nodes | None:
        """Sides on nodes of their own."""
        w, cluster = self.pool.gpus_per_node, self.pool.num_nodes
        a_group = a.attention_ranks * a.tensor_parallel * a.context_parallel
        f_group = a.ffn_ranks * a.expert_tensor_parallel
        a_nodes, f_nodes = math.ceil(a.attention_gpus / w), math.ceil(a.ffn_gpus / w)
        if a_nodes + f_nodes > cluster:
            return None
        if self.p.space.whole_nodes and (a.attention_gpus % w or a.ffn_gpus % w):
            return None
        neighbours = a_group % w == 0 and f_group % w == 0 and a.attention_groups == a.ffn_groups
        span = (a_group + f_group) // w if neighbours else a_nodes + f_nodes
        one_node = w % (a.attention_groups * a_group) == 0
        even = f_group % w == 0 or w % f_group == 0
        return Nodes(
            a_per_node=min(w, a.attention_gpus),
            f_per_node=min(w, a.ffn_gpus),
            m2n=1.0,
            n2m=1.0,
            lane=float(a.attention_groups > 1 and not one_node),
            ffn_nodes=math.ceil(f_group / w) if even else 0,
            m2n_span=span,
            n2m_span=span,
        )

    def shared(self, a: Allocation, layout: NodeLayout) -> Nodes | None:
        """Blocks of groups on nodes."""
        w, common = self.pool.gpus_per_node, math.gcd(a.attention_groups, a.ffn_groups)
        if layout is NodeLayout.PAIRED and common == 1:
            return None
        blocks = common if layout is NodeLayout.PAIRED else 1
        a_block, f_block = a.attention_gpus // a.replicas // blocks, a.ffn_gpus // a.replicas // blocks
        block, total = a_block + f_block, a.replicas * blocks
        if block >= w:
            m = block // w
            if block % w or a.attention_ranks % m or a.ffn_ranks % m or total * m > self.pool.num_nodes:
                return None
            inside = 1 - 1 / m
            other = inside if blocks == 1 else 1.0
            lane = 0.0 if blocks == 1 else 1.0
            return Nodes(a_block / m, f_block / m, inside, other, lane, m, m, m if blocks == 1 else 2 * m)
        per_node = min(w // block, total)
        if blocks % per_node and per_node % blocks:
            return None
        if self.p.space.whole_nodes and (w % block or total % per_node):
            return None
        if math.ceil(total / per_node) > self.pool.num_nodes:
            return None
        other = 0.0 if per_node >= blocks else 1 / per_node
        return Nodes(a_block * per_node, f_block * per_node, 0.0, other, other, 1, 1, 2 if other else 1)

    def nic_rates(self, nodes: Nodes, layout: NodeLayout) -> list[tuple[float, float]]:
        """Bytes per second that the GPUs of a node's two sides get together, every split of its NICs."""
        speeds = [gbit / 8 * 1e9 * self.network.efficiency for gbit in self.pool.nics_gbit_per_s]
        if not speeds:
            return [(math.inf, math.inf)]
        if layout is NodeLayout.SEPARATE:
            return [(sum(speeds), sum(speeds))]
        if len(speeds) < 2 or not self.network.shared_nics:
            both = nodes.a_per_node + nodes.f_per_node
            return [(sum(speeds) * nodes.a_per_node / both, sum(speeds) * nodes.f_per_node / both)]
        found = set()
        for count in range(1, len(speeds)):
            for chosen in itertools.combinations(speeds, count):
                found.add((sum(chosen), sum(speeds) - sum(chosen)))
        return sorted(found)

    def spine_loads(self, a: Allocation, layout: NodeLayout) -> tuple[float, float]:
        """For each side the rings of a reduction that leave the busiest leaf, times the ratio, over a leaf's nodes."""
        w, leaf, ratio = self.pool.gpus_per_node, self.network.nodes_per_leaf, self.network.oversubscription
        if not leaf or ratio == 1:
            return 0.0, 0.0
        a_group, a_gpus = a.attention_ranks * a.tensor_parallel * a.context_parallel, a.attention_gpus // a.replicas
        f_gpus = a.ffn_gpus // a.replicas
        if layout is not NodeLayout.SEPARATE:
            a_gpus = f_gpus = a_gpus + f_gpus
        blocks = math.gcd(a.attention_groups, a.ffn_groups) if layout is NodeLayout.PAIRED else 1
        a_alike = math.ceil(a_group / w) if layout is NodeLayout.SEPARATE else math.ceil(a_gpus // blocks / w)
        loads = []
        for gpus, alike in ((a_gpus, a_alike), (f_gpus, 1)):
            nodes_of_ring: dict[int, list[int]] = {}  # what a node holds -> nodes
            if gpus < w:
                nodes_of_ring[0] = list(range(math.ceil(a.replicas / (w // gpus))))
            else:
                span = math.ceil(gpus / w)
                for node in range(a.replicas * span):
                    nodes_of_ring.setdefault(node % span // alike, []).append(node)
            leaving = [0] * (1 + max(max(nodes) for nodes in nodes_of_ring.values()))
            for nodes in nodes_of_ring.values():
                leaves = {node // leaf for node in nodes}
                for each in leaves if len(leaves) > 1 else ():
                    leaving[each] += 1
            loads.append(ratio * max(leaving) / leaf)
        return loads[0], loads[1]

    def transfers(
        self, a: Allocation, nodes: Nodes, rates: tuple[float, float], mode: str
    ) -> Transfers:
        """Everything about what travels."""
        model, job, moe = self.p.model, self.p.job, self.p.model.moe
        on_ranks = expected_parts(moe, a.ffn_ranks)
        rows = {"per-expert": float(moe.top_k), "per-rank": on_ranks}.get(mode)
        handed = 0.0
        if rows is None:
            rows = expected_parts(moe, nodes.ffn_nodes)
            handed = on_ranks - rows
        tokens, row = a.attention_ranks * job.tokens_per_rank, model.hidden_size * self.width
        cut = a.tensor_parallel * a.context_parallel
        a_gpus, f_gpus = a.attention_ranks * cut, a.ffn_ranks * a.expert_tensor_parallel
        a_nic, f_nic = rates[0] / nodes.a_per_node, rates[1] / nodes.f_per_node
        nvlink = self.pool.nvlink_gb_per_s * 1e9 * self.pool.nvlink_efficiency

        def spine(span: float, off: float) -> float:
            leaf, share = self.network.nodes_per_leaf, 0.0
            if leaf and span > leaf:
                others = range(1, int(span))  # as node 0 sees them
                share = 1.0 if off == 1 else sum(node >= leaf for node in others) / len(others)
            if self.network.rail_optimised and not self.network.cross_rail_forwarding and self.pool.nics_per_node > 1:
                share = max(share, 1 - 1 / self.pool.nics_per_node)
            return max(1.0, share * self.network.oversubscription)

        def latency(off: float) -> float:
            return (self.network.latency_us if off > 0 else self.network.local_latency_us) * 1e-6

        def seconds(total: float, off: float, span: float) -> float:
            away, here = total * off, total * (1 - off) + tokens * handed * row
            at_a = max(away * spine(span, off) / a_nic, here / nvlink) / a_gpus
            at_f = max(away * spine(span, off) / f_nic, here / nvlink) / f_gpus
            return max(at_a, job.imbalance * at_f) + latency(off)

        n2m = tokens * rows * row
        lane_bytes = 0.0
        if a.attention_groups > 1:
            lane_bytes = tokens * (row * (2 if moe.shared_ffn_hidden_size else 1) + 8 * rows)
        lane = 0.0
        if lane_bytes:
            away, here = lane_bytes * nodes.lane, lane_bytes * (1 - nodes.lane)
            lane = max(away * spine(nodes.n2m_span, nodes.n2m) / a_nic, here / nvlink) / a_gpus + latency(nodes.lane)
        memory_rate = self.gpu.memory_bandwidth_gb_per_s * 1e9 * self.gpu.efficiency.memory
        packing = 2 * (1 + rows) * model.hidden_size * job.tokens_per_rank / cut * self.width / memory_rate
        return (
            seconds(n2m + tokens * moe.top_k * 8, nodes.m2n, nodes.m2n_span),
            seconds(n2m, nodes.n2m, nodes.n2m_span),
            lane,
            packing,
            n2m / a_gpus,
            tokens * (rows + handed) * row * job.imbalance / f_gpus,
            lane_bytes / a_gpus,
        )
