"""The planner's objective and its exhaustive search once more, in plain Python: loops, no arrays, no pruning.

Takes the seconds and bytes of single stages from the library (tests hold those against figures by hand) and shares
nothing else with it: layouts, transfers, memory, live counts, bounds and waiting are written out from docs/planner.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import Allocation, NodeLayout
from megatron_disagmoe.planner.attention_side import AttentionSide, AttentionSizes, attention_side, stage_table
from megatron_disagmoe.planner.ffn_side import ffn_side
from megatron_disagmoe.planner.problem import Problem
from tests.planner.oracle_machines import Machines, Nodes, Transfers
from tests.planner.oracle_pipeline import Run

#: A group that must fit: its fixed bytes, what a live micro-batch-layer keeps; number of its side's groups, its own
#: number, its side (0 attention, 1 FFN).
Room = tuple[float, float, int, int, int]


@dataclass(frozen=True)
class Timed:
    """An allocation that fits, its objective, and a time that no schedule of it undercuts."""

    allocation: Allocation
    seconds: float
    bound: float


@cache
def live(layers: int, sizes: tuple[int, int], p: int, group: int, side: int, g: int, n: int) -> int:
    """Micro-batch-layers alive on a group of ``p``, virtual group after virtual group; ``sizes``: (pA, pF)."""
    q = math.lcm(*sizes)
    total = most = 0
    for u in range(group, q, p):
        v = (layers - 1 - u) // q + 1
        last = 2 * (u + (v - 1) * q) + side
        total += (v - 1) * g + 2 * (2 * layers - 1 - last) + 1
        most += v * n
    return min(total, most)


class Oracle:
    """One problem, all on one pool of the cluster."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.machines = Machines(problem)
        self.pool, self.network = problem.attention_pool, problem.cluster.network
        self.gpu = self.pool.gpu
        self.layers = problem.model.num_moe_layers
        self.attention_parameters = cache(self._attention_parameters)
        self.ffn_parameters = cache(self._ffn_parameters)
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
        best, whose, count = math.inf, "nobody", 0
        for shape in self.shapes():
            for each in self.timed(shape):
                count += 1
                if each.seconds < best:
                    best, whose = each.seconds, str(each)
        return best, whose, count

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
            nodes = self.machines.nodes_of(a, layout)
            if nodes is None or (mode == "per-node" and not nodes.ffn_nodes):
                continue
            sync = self.synchronise(a, nodes, layout)
            for split, rates in enumerate(self.machines.nic_rates(nodes, layout)):
                transfers = self.machines.transfers(a, nodes, rates, mode)
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

    def synchronise(self, a: Allocation, nodes: Nodes, layout: NodeLayout) -> float:
        """Seconds after the pipeline."""
        state, model = self.p.state, self.p.model
        sizes = (a.attention_groups, a.tensor_parallel)
        a_parameters = max(self.attention_parameters(*sizes, group) for group in range(a.attention_groups))
        f_parameters = self.ffn_parameters(a.ffn_groups, a.ffn_ranks * a.expert_tensor_parallel)
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
        a_spine, f_spine = self.machines.spine_loads(a, layout)
        if layout is NodeLayout.SEPARATE:
            network = max(a_off * max(1.0, a_spine), f_off * max(1.0, f_spine)) / rate
        else:
            network = max(a_off + f_off, a_off * a_spine + f_off * f_spine) / rate
        nvlink = max(a_moved, f_moved) / (self.pool.nvlink_gb_per_s * 1e9 * self.pool.nvlink_efficiency)
        shards = (a_copies, f_copies) if self.p.space.distributed_optimizer else (1, 1)
        memory_rate = self.gpu.memory_bandwidth_gb_per_s * 1e9 * self.gpu.efficiency.memory
        step = 2 * state.total * max(a_parameters / shards[0], f_parameters / shards[1]) / memory_rate
        assert model.num_moe_layers == self.layers
        return max(network, nvlink) + step

    def _attention_parameters(self, groups: int, tp: int, group: int) -> float:
        """On one GPU of an attention group."""
        model, tail = self.p.model, self.layers % groups
        total = 0.0
        for stage in range(group, self.layers + 1, groups):
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

    def _ffn_parameters(self, groups: int, gpus: int) -> float:
        """On one GPU of FFN group 0."""
        model = self.p.model
        return math.ceil(self.layers / groups) * model.moe.num_experts * model.num_expert_parameters / gpus

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
        usable, rooms = self.gpu.usable_bytes, self.rooms(a, side, ffn, transfers, again=lever[1])
        run = Run(self.layers, a, side, ffn, transfers, again=lever[1], split=kind == "split-backward")
        n = a.num_micro_batches(self.p.job)
        if kind == "sequential":
            if all(fixed + ((self.layers - 1 - g) // p + 1) * kept <= usable for fixed, kept, p, g, _ in rooms):
                yield n * run.whole_path(), run.fill_bound(n), 1
            return
        fill: float | None = None
        sizes = (a.attention_groups, a.ffn_groups)
        for size in range(1, n + 1):
            g = math.ceil(n / math.ceil(n / size))
            if g != size:
                continue  # groups are made even: the same as a smaller size
            if all(fixed + live(self.layers, sizes, *group, g, n) * kept <= usable for fixed, kept, *group in rooms):
                if fill is None:
                    fill = run.fill_bound(n)
                counts = [live(self.layers, sizes, p, 0, at, g, n) for at, p in enumerate(sizes)]
                resident = run.residence(n, (counts[0], counts[1]))
                most = 1.15 * max(fill, resident) if a.attention_groups == a.ffn_groups else math.inf
                yield min(max(fill + run.waiting(g), resident), most), fill, g

    def rooms(
        self, a: Allocation, side: AttentionSide, ffn: tuple[float, ...], transfers: Transfers, *, again: bool
    ) -> list[Room]:
        """Attention group 0, the tail's group and FFN group 0, which must fit."""
        state, groups = self.p.state, a.attention_groups
        sharded = self.p.space.distributed_optimizer
        a_copies = a.attention_ranks * a.replicas * a.context_parallel if sharded else 1
        f_copies = a.replicas if sharded else 1
        tail = self.layers % groups
        rooms: list[Room] = []
        stages = side.kept.tolist()
        for group in {0, tail}:
            parameters = self.attention_parameters(groups, a.tensor_parallel, group)
            total = parameters * (state.weight + state.gradient + state.optimizer / a_copies)
            total += side.workspace + 4 * transfers[4] + 4 * transfers[6]
            if group == tail:
                total += stages[-1] + side.tail_workspace
            kept = stages[group : self.layers : groups]
            rooms.append((total, sum(kept) / len(kept), groups, group, 0))
        parameters = self.ffn_parameters(a.ffn_groups, a.ffn_ranks * a.expert_tensor_parallel)
        total = parameters * (state.weight + state.gradient + state.optimizer / f_copies) + ffn[4] + 4 * transfers[5]
        pairs = self.p.job.tokens_per_rank * self.p.model.moe.top_k * 8 * a.attention_ranks / a.ffn_ranks
        rooms.append((total, pairs if again else ffn[3], a.ffn_groups, 0, 1))
        return rooms
