"""The planner's objective and its exhaustive search once more, in plain Python: loops, no arrays, no pruning.

Takes the seconds and bytes of single stages from the library (tests hold those against figures by hand) and shares
nothing else with it: layouts, transfers, memory, live counts, bounds and waiting are written out from docs/planner.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import Allocation, NodeLayout
from megatron_disagmoe.planner.attention_side import AttentionSide, AttentionSizes, attention_side, stage_table
from megatron_disagmoe.planner.ffn_side import ffn_side
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.routing import expected_parts

#: Seconds of M2N, N2M, lane and packing; bytes of a message on A and F GPUs and of a lane.
Transfers = tuple[float, float, float, float, float, float, float]
#: Live micro-batch-layers by number of groups, group and side (0 attention, 1 FFN).
LiveCount = Callable[[int, int, int], int]


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


@dataclass(frozen=True)
class Timed:
    """An allocation that fits, its objective, and a time that no schedule of it undercuts."""

    allocation: Allocation
    seconds: float
    bound: float


class Oracle:
    """One problem, all on one pool of the cluster."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.pool, self.network = problem.attention_pool, problem.cluster.network
        self.gpu = self.pool.gpu
        self.width = self.gpu.bytes_per_number
        self.layers = problem.model.num_moe_layers
        self.table = stage_table(problem.model, sequence=problem.job.sequence_length)
        self.attention = cache(self._attention)
        self.ffn = cache(self._ffn)

    def _attention(self, tp: int, cp: int, recompute: Recompute) -> AttentionSide:
        job = self.p.job
        sizes = AttentionSizes(job.sequence_length, job.micro_batch_size, tp, cp, recompute)
        return attention_side(self.p.model, self.pool, self.network, table=self.table, sizes=sizes)

    def _ffn(self, m: int, n: int, etp: int, recompute: Recompute) -> tuple[float, ...]:
        moe, job = self.p.model.moe, self.p.job
        side = ffn_side(
            self.p.model,
            self.pool,
            self.network,
            rows=job.tokens_per_rank * moe.top_k * m / n * job.imbalance,
            experts_per_rank=moe.num_experts / n,
            tensor_parallel=etp,
            recompute=recompute,
        )
        return tuple(float(x) for x in (side.forward, side.backward, side.weight, side.kept, side.workspace))

    def best(self) -> tuple[float, str, int]:
        """The least step time of all allocations (infinite where none fits), whose it is, and how many there were."""
        times = [(each.seconds, str(each)) for a in self.shapes() for each in self.timed(a)]
        return *min(times, default=(math.inf, "nobody")), len(times)

    def shapes(self) -> Iterator[Allocation]:
        """Every size, cut and layout."""
        s, job, model = self.p.space, self.p.job, self.p.model
        gpus, batch = self.p.max_gpus, job.global_batch_size // job.micro_batch_size
        cuts = [
            (tp, cp)
            for tp in s.tensor_parallel
            for cp in s.context_parallel
            if model.attention.num_query_groups % tp == 0 and self.pool.gpus_per_node % (tp * cp) == 0
        ]
        depths = range(1, min(self.layers, gpus) + 1)
        ranks = range(1, batch + 1)
        for pa, pf in itertools.product(depths, depths):
            if math.lcm(pa, pf) > self.layers or (pa != pf and not s.asymmetric):
                continue
            for r, m, (tp, cp) in itertools.product(ranks, ranks, cuts):
                if batch % (r * m) or r * (pa * m * tp * cp + pf) > gpus:
                    continue
                for n, etp in itertools.product(range(1, model.moe.num_experts + 1), s.expert_tensor_parallel):
                    if model.moe.num_experts % n or self.pool.gpus_per_node % etp or model.moe.ffn_hidden_size % etp:
                        continue
                    if r * (pa * m * tp * cp + pf * n * etp) <= gpus:
                        yield Allocation(
                            attention_groups=pa,
                            ffn_groups=pf,
                            attention_ranks=m,
                            ffn_ranks=n,
                            replicas=r,
                            tensor_parallel=tp,
                            context_parallel=cp,
                            expert_tensor_parallel=etp,
                        )

    def timed(self, a: Allocation) -> Iterator[Timed]:
        """Everything that can be chosen for a shape and fits."""
        s = self.p.space
        for layout, mode in itertools.product(s.layouts, s.dispatch):
            nodes = self.separate(a) if layout is NodeLayout.SEPARATE else self.shared(a, layout)
            if nodes is None or (mode == "per-node" and not nodes.ffn_nodes):
                continue
            for split, rates in enumerate(self.nic_rates(nodes, layout)):
                transfers = self.transfers(a, nodes, rates, mode)
                sync = self.synchronise(a, nodes, layout)
                for recompute, lever, kind in itertools.product(s.recompute_attention, s.ffn_levers, s.schedules):
                    chosen = replace(
                        a,
                        nodes=layout,
                        dispatch=mode,
                        nic_split=split,
                        recompute_attention=recompute,
                        recompute_ffn=lever[0],
                        redispatch=lever[1],
                        schedule=kind,
                    )
                    for seconds, bound, size in self.pipelines(a, transfers, recompute, lever, kind):
                        yield Timed(replace(chosen, group_size=size), seconds + sync, bound + sync)

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

        def spine(span: float) -> float:
            share = max(0.0, 1 - self.network.nodes_per_leaf / span) if self.network.nodes_per_leaf else 0.0
            if self.network.rail_optimised and not self.network.cross_rail_forwarding and self.pool.nics_per_node > 1:
                share = max(share, 1 - 1 / self.pool.nics_per_node)
            return max(1.0, share * self.network.oversubscription)

        def latency(off: float) -> float:
            return (self.network.latency_us if off > 0 else self.network.local_latency_us) * 1e-6

        def seconds(total: float, off: float, span: float) -> float:
            away, here = total * off, total * (1 - off) + tokens * handed * row
            at_a = max(away * spine(span) / a_nic, here / nvlink) / a_gpus
            at_f = max(away * spine(span) / f_nic, here / nvlink) / f_gpus
            return max(at_a, job.imbalance * at_f) + latency(off)

        n2m = tokens * rows * row
        lane_bytes = 0.0
        if a.attention_groups > 1:
            lane_bytes = tokens * (row * (2 if moe.shared_ffn_hidden_size else 1) + 8 * rows)
        lane = 0.0
        if lane_bytes:
            away, here = lane_bytes * nodes.lane, lane_bytes * (1 - nodes.lane)
            lane = max(away * spine(nodes.n2m_span) / a_nic, here / nvlink) / a_gpus + latency(nodes.lane)
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

    def synchronise(self, a: Allocation, nodes: Nodes, layout: NodeLayout) -> float:
        """Seconds after the pipeline."""
        state, model = self.p.state, self.p.model
        a_parameters = max(self.attention_parameters(a, g) for g in range(a.attention_groups))
        f_parameters = self.ffn_parameters(a)
        a_copies, f_copies = a.attention_ranks * a.replicas * a.context_parallel, a.replicas
        moved = state.gradient + (state.weight if self.p.space.distributed_optimizer else state.gradient)
        a_moved = a_parameters * moved * (a_copies - 1) / a_copies
        f_moved = f_parameters * moved * (f_copies - 1) / f_copies
        group = a.attention_ranks * a.tensor_parallel * a.context_parallel
        held = math.ceil(nodes.a_per_node / group)
        if layout is NodeLayout.PAIRED:
            held = max(held, a.attention_groups // math.gcd(a.attention_groups, a.ffn_groups))
        if layout is NodeLayout.SPREAD:
            held = a.attention_groups
        different = min(nodes.a_per_node, held * a.tensor_parallel)
        a_off = 0.0 if nodes.a_per_node / different >= a_copies else a_moved * different
        f_off = f_moved * nodes.f_per_node
        gbit = sum(self.pool.nics_gbit_per_s)
        rate = gbit / 8 * 1e9 * self.network.efficiency if gbit else math.inf
        network = max(a_off, f_off) / rate if layout is NodeLayout.SEPARATE else (a_off + f_off) / rate
        nvlink = max(a_moved, f_moved) / (self.pool.nvlink_gb_per_s * 1e9 * self.pool.nvlink_efficiency)
        shards = (a_copies, f_copies) if self.p.space.distributed_optimizer else (1, 1)
        memory_rate = self.gpu.memory_bandwidth_gb_per_s * 1e9 * self.gpu.efficiency.memory
        step = 2 * state.total * max(a_parameters / shards[0], f_parameters / shards[1]) / memory_rate
        assert model.num_moe_layers == self.layers
        return max(network, nvlink) + step

    def attention_parameters(self, a: Allocation, group: int) -> float:
        """On one GPU of an attention group."""
        model, tp, tail = self.p.model, a.tensor_parallel, self.layers % a.attention_groups
        total = 0.0
        for stage in range(group, self.layers + 1, a.attention_groups):
            norms = 2 * len(model.stage_layers[stage]) * model.num_norm_parameters()
            router = 0
            if stage < self.layers:
                router = model.moe.num_experts * (model.hidden_size + model.moe.router_bias)
                router += model.hidden_size * model.moe.shared_gate
            total += (model.num_stage_parameters(stage) - norms - router) / tp + norms + router
        if group == 0:
            total += model.num_embedding_parameters / tp
        if group == tail:
            total += model.num_norm_parameters()
            if not model.tied_embeddings or tail:
                total += model.vocab_size * model.hidden_size / tp
        return total

    def ffn_parameters(self, a: Allocation) -> float:
        """On one GPU of FFN group 0."""
        model = self.p.model
        experts = math.ceil(self.layers / a.ffn_groups) * model.moe.num_experts * model.num_expert_parameters
        return experts / (a.ffn_ranks * a.expert_tensor_parallel)

    def pipelines(
        self,
        a: Allocation,
        transfers: Transfers,
        recompute: Recompute,
        lever: tuple[Recompute, bool],
        kind: str,
    ) -> Iterator[tuple[float, float, int]]:
        """Seconds of the pipeline at every G that fits, and what no schedule is faster than."""
        side = self.attention(a.tensor_parallel, a.context_parallel, recompute)
        ffn = self.ffn(a.attention_ranks, a.ffn_ranks, a.expert_tensor_parallel, lever[0])
        run = _Run(self, a, side, ffn, transfers, again=lever[1], split=kind == "split-backward")
        n = a.num_micro_batches(self.p.job)
        if kind == "sequential":
            if self.fits(a, side, ffn, transfers, lever[1], lambda p, g, side: (self.layers - 1 - g) // p + 1):
                yield n * run.whole_path(), run.fill_bound(n), 1
            return
        fill: float | None = None
        for size in range(1, n + 1):
            g = math.ceil(n / math.ceil(n / size))
            if g != size:
                continue  # groups are made even: the same as a smaller size
            if self.fits(a, side, ffn, transfers, lever[1], self.live_count(a, g, n)):
                if fill is None:
                    fill = run.fill_bound(n)
                yield max(fill + run.waiting(g), run.residence(g, n)), fill, g

    def live_count(self, a: Allocation, g: int, n: int) -> LiveCount:
        """``live`` of one allocation and G."""
        return lambda p, group, side: self.live(a, p, group, g, n, side)

    def live(self, a: Allocation, p: int, group: int, g: int, n: int, side: int) -> int:
        """Micro-batch-layers alive on a group of ``p``, virtual group after virtual group."""
        q = math.lcm(a.attention_groups, a.ffn_groups)
        total = most = 0
        for u in range(group, q, p):
            v = (self.layers - 1 - u) // q + 1
            last = 2 * (u + (v - 1) * q) + side
            total += (v - 1) * g + 2 * (2 * self.layers - 1 - last) + 1
            most += v * n
        return min(total, most)

    def fits(
        self,
        a: Allocation,
        side: AttentionSide,
        ffn: tuple[float, ...],
        transfers: Transfers,
        again: bool,
        live: LiveCount,
    ) -> bool:
        """Whether attention group 0, the tail's group and FFN group 0 fit their memory."""
        state, usable = self.p.state, self.gpu.usable_bytes
        sharded = self.p.space.distributed_optimizer
        a_copies = a.attention_ranks * a.replicas * a.context_parallel if sharded else 1
        f_copies = a.replicas if sharded else 1
        tail = self.layers % a.attention_groups
        for group in {0, tail}:
            parameters = self.attention_parameters(a, group)
            total = parameters * (state.weight + state.gradient + state.optimizer / a_copies)
            total += side.workspace + 4 * transfers[4] + 4 * transfers[6]
            if group == tail:
                total += float(side.kept[-1]) + side.tail_workspace
            kept = [float(x) for x in side.kept[group : self.layers : a.attention_groups]]
            total += live(a.attention_groups, group, 0) * sum(kept) / len(kept)
            if total > usable:
                return False
        parameters = self.ffn_parameters(a)
        total = parameters * (state.weight + state.gradient + state.optimizer / f_copies) + ffn[4] + 4 * transfers[5]
        pairs = self.p.job.tokens_per_rank * self.p.model.moe.top_k * 8 * a.attention_ranks / a.ffn_ranks
        total += live(a.ffn_groups, 0, 1) * (pairs if again else ffn[3])
        return total <= usable


class _Run:
    """Times of stages and transfers of one allocation, and bounds on its pipeline."""

    def __init__(
        self,
        oracle: Oracle,
        a: Allocation,
        side: AttentionSide,
        ffn: tuple[float, ...],
        transfers: Transfers,
        *,
        again: bool,
        split: bool,
    ) -> None:
        self.a, self.oracle, self.layers, self.again, self.split = a, oracle, oracle.layers, again, split
        self.m2n, self.n2m, self.lane, packing = transfers[:4]
        last = 2 * self.layers
        self.forward = [0.0] * (last + 1)
        self.back, self.weight = list(self.forward), list(self.forward)
        for i in range(self.layers + 1):
            extra = packing if i < self.layers else 0.0
            self.forward[2 * i] = float(side.forward[i]) + extra
            self.back[2 * i] = float(side.backward[i]) + extra
            self.weight[2 * i] = float(side.weight[i])
            if i < self.layers:
                self.forward[2 * i + 1], self.back[2 * i + 1], self.weight[2 * i + 1] = ffn[:3]
        self.inputs = [b - w if split else b for b, w in zip(self.back, self.weight, strict=True)]

    def edge(self, stage: int) -> float:
        """Of the transfer between a stage and the next."""
        return self.m2n if stage % 2 == 0 else self.n2m

    def whole_path(self) -> float:
        """One micro-batch alone."""
        return sum(self.forward) + sum(self.back) + 2 * self.layers * (self.m2n + self.n2m)

    def group(self, stage: int) -> tuple[str, int]:
        """Who runs a stage."""
        i = stage // 2
        return ("F", i % self.a.ffn_groups) if stage % 2 else ("A", i % self.a.attention_groups)

    def fill_bound(self, n: int) -> float:
        """Every resource: earliest first work, all work, least time after the last."""
        last = 2 * self.layers
        start, after = [0.0] * (last + 1), [0.0] * (last + 1)
        after[0] = self.weight[0] if self.split else 0.0
        for s in range(1, last + 1):
            start[s] = start[s - 1] + self.forward[s - 1] + self.edge(s - 1)
            after[s] = after[s - 1] + self.inputs[s - 1] + self.edge(s - 1)
        work: dict[tuple[str, str, int], list[float]] = {}

        def add(port: str, stage: int, time: float, begin: float, end: float) -> None:
            known = work.setdefault((port, *self.group(stage)), [math.inf, 0.0, math.inf])
            known[0], known[1], known[2] = min(known[0], begin), known[1] + n * time, min(known[2], end)

        for s in range(last + 1):
            add("work", s, self.forward[s] + self.back[s], start[s], 0.0 if self.split else after[s])
            for to, time in ((s + 1, self.edge(s)), (s + 2, self.lane if s % 2 == 0 else 0.0)):
                if to <= last and time > 0:
                    made = start[s] + self.forward[s]
                    add("out", s, time, made, math.inf)
                    add("in", to, time, made, math.inf)
                    add("out", to, time, math.inf, self.inputs[s] + after[s])
                    add("in", s, time, math.inf, self.inputs[s] + after[s])
            if self.again and s % 2 == 0 and s < last:
                made, user = start[s] + self.forward[s], self.inputs[s + 1] + after[s + 1]
                add("out", s, self.m2n, made, user)
                add("in", s + 1, self.m2n, made, user)
        return max(begin + busy + end for begin, busy, end in work.values())

    def _mean_attention(self) -> tuple[float, float, float]:
        stages = range(0, 2 * self.layers, 2)
        count = self.layers
        mean = [sum(table[s] for s in stages) / count for table in (self.forward, self.back)]
        return mean[0], mean[1], self.forward[1]

    def waiting(self, g: int) -> float:
        """What groups smaller than a trip round the ring cost."""
        a = self.a
        q = math.lcm(a.attention_groups, a.ffn_groups)
        forward, back, ffn = self._mean_attention()
        ffn_back = self.inputs[1]
        per_a, per_f = q / a.attention_groups, q / a.ffn_groups
        edges = self.m2n + self.n2m
        there = q * (forward + ffn + edges) - g * max(per_a * forward, per_f * ffn)
        again = q * (back + ffn_back + edges) - g * max(per_a * back, per_f * ffn_back)
        return max(self.layers / q - 1, 0.0) * (max(there, 0.0) + max(again, 0.0))

    def residence(self, g: int, n: int) -> float:
        """What the live counts ask for."""
        a = self.a
        forward, back, _ = self._mean_attention()
        edges = 2 * (self.m2n + self.n2m)
        layer = forward + back + edges + self.forward[1] + self.back[1]
        whole = sum(self.forward) + sum(self.back) + self.layers * edges

        def bound(p: int, side: int, outside: float) -> float:
            inside = sum(whole - outside - i * layer for i in range(0, self.layers, p))
            return n * inside / max(self.oracle.live(a, p, 0, g, n, side), 1)

        at_f = 0.0 if self.again else bound(a.ffn_groups, 1, forward + back + 2 * self.m2n)
        return max(bound(a.attention_groups, 0, 0.0), at_f)
