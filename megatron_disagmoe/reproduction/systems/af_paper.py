"""The paper's AF-pipe: free A:F ratios on shared nodes, one copy per (token, expert), interleaved 1F1B, one depth.

The planner wants whole experts on every FFN rank; the paper runs 16:10, which no number of experts here divides. So
this edition takes any N: the fullest rank has ceil(E / N) experts and gets that much more of the rows. A_g and F_g
share their nodes, and NICs are split evenly whatever the GPUs are (the paper's 16:16). Compute, transfers and memory
come from the planner's functions, schedules from the builders, time from the event engine.

Simplifications: a block of M + N GPUs that isn't a whole number of nodes counts with that broken number; M2N stays
inside a node for 1 / (nodes of a block) of its rows, N2M leaves it always (it goes to the next group's block).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from megatron_disagmoe.builders.placement import balanced_placement
from megatron_disagmoe.planner.activations import PAIR_BYTES, Recompute
from megatron_disagmoe.planner.allocation import DispatchMode, ScheduleKind
from megatron_disagmoe.planner.arrays import Floats
from megatron_disagmoe.planner.attention_side import AttentionSide, AttentionSizes, attention_side, stage_table
from megatron_disagmoe.planner.ffn_side import FfnSide, ffn_side
from megatron_disagmoe.planner.layered_costs import LayeredCosts
from megatron_disagmoe.planner.layout import Geometry
from megatron_disagmoe.planner.memory import LANES, MESSAGES
from megatron_disagmoe.planner.model_spec import MixtureOfExperts
from megatron_disagmoe.planner.operations import packing_numbers
from megatron_disagmoe.planner.rings import spine_load
from megatron_disagmoe.planner.routing import expected_parts
from megatron_disagmoe.planner.space import FFN_LEVERS, FfnLever
from megatron_disagmoe.planner.states import attention_parameters, state_level
from megatron_disagmoe.planner.timing import Timer
from megatron_disagmoe.planner.traffic import Ends, Rows, node_nic_rate, transfer_times, volumes
from megatron_disagmoe.reproduction.systems.choose import Task
from megatron_disagmoe.schedules.actions import Placement

#: How steeply step times rise below the cap that groups of 2p micro-batches ask for; for choosing what to build.
_CAPPED = 2.0


@dataclass(frozen=True)
class Shape:
    """p groups a side, M attention and N FFN ranks, TP and CP of an attention rank, R replicas; levers of memory.

    ``nics``: NICs of either side of a block, which then lies on as many nodes as have them; None: the block's own.
    ``dispatch``, ``kind``: the paper's own where not given. ``tail_share``: how much of the output layer's weight is
    made up for by fewer layers beside it; 0: layers in turn.
    """

    groups: int
    attention_ranks: int
    ffn_ranks: int
    replicas: int
    tensor_parallel: int = 1
    context_parallel: int = 1
    recompute_attention: Recompute = Recompute.NONE
    ffn_lever: FfnLever = FFN_LEVERS[0]
    nics: int | None = None
    dispatch: DispatchMode = "per-expert"
    kind: ScheduleKind = "interleaved-1f1b"
    tail_share: float = 0.0

    @property
    def gpus_per_rank(self) -> int:
        """GPUs that share a sequence."""
        return self.tensor_parallel * self.context_parallel

    @property
    def attention_gpus(self) -> int:
        """Of one group."""
        return self.attention_ranks * self.gpus_per_rank

    @property
    def gpus(self) -> int:
        """Of everything."""
        return self.replicas * self.groups * (self.attention_gpus + self.ffn_ranks)


@dataclass
class Shared:
    """What shapes of one task have in common, by what it depends on."""

    attention: dict[tuple[int, int, Recompute], AttentionSide] = field(default_factory=dict)
    ffn: dict[tuple[int, int, Recompute], FfnSide] = field(default_factory=dict)
    held: dict[tuple[int, int, tuple[int, ...]], float] = field(default_factory=dict)
    transfers: dict[Shape, tuple[float, float, float]] = field(default_factory=dict)


class Evaluated:
    """What a shape costs: stages, transfers, memory. ``shared``: of all shapes of the task."""

    def __init__(self, task: Task, shape: Shape, shared: Shared | None = None) -> None:
        self.task, self.shape = task, shape
        self.shared = Shared() if shared is None else shared
        self.model = task.model
        self.pool = task.cluster.pools[0]
        self.width = self.pool.gpu.bytes_per_number

    @property
    def micro_batches(self) -> int:
        """n: what comes nearest to the task's batch."""
        c, s = self.task.constants, self.shape
        return max(1, round(self.task.batch / (c.micro_batch_size * s.attention_ranks * s.replicas)))

    @property
    def batch(self) -> int:
        """Sequences of a step: whole micro-batches of all ranks."""
        s = self.shape
        return self.micro_batches * s.attention_ranks * s.replicas * self.task.constants.micro_batch_size

    @property
    def micro_batch_tokens(self) -> int:
        """Of all attention ranks of a group."""
        return self.task.sequence * self.task.constants.micro_batch_size * self.shape.attention_ranks

    @cached_property
    def placement(self) -> Placement:
        """Layers in turn, or with fewer beside the output layer."""
        p, share, layers = self.shape.groups, self.shape.tail_share, self.model.num_moe_layers
        if share:
            return balanced_placement(layers, p, p, replace(self.costs, tail=share * self.costs.tail))
        return Placement.round_robin(num_layers=layers, num_attention_groups=p, num_ffn_groups=p)

    @property
    def layers_of_group(self) -> int:
        """v: of the fullest FFN group."""
        return -(-self.model.num_moe_layers // self.shape.groups)

    @cached_property
    def uneven(self) -> float:
        """Rows of the fullest FFN rank over the mean: of uneven experts and of uneven routing."""
        experts = self.model.moe.num_experts / self.shape.ffn_ranks
        return math.ceil(experts) / experts * self.task.imbalance

    @cached_property
    def attention(self) -> AttentionSide:
        """Stages of an attention GPU."""
        s, task = self.shape, self.task
        key = (s.tensor_parallel, s.context_parallel, s.recompute_attention)
        if key not in self.shared.attention:
            sizes = AttentionSizes(task.sequence, task.constants.micro_batch_size, *key)
            table = stage_table(self.model, sequence=task.sequence)
            network = task.cluster.network
            self.shared.attention[key] = attention_side(self.model, self.pool, network, table=table, sizes=sizes)
        return self.shared.attention[key]

    @cached_property
    def ffn(self) -> FfnSide:
        """Stages of the fullest FFN GPU."""
        key = (self.shape.attention_ranks, self.shape.ffn_ranks, self.shape.ffn_lever[0])
        if key not in self.shared.ffn:
            self.shared.ffn[key] = self._ffn()
        return self.shared.ffn[key]

    def _ffn(self) -> FfnSide:
        experts = self.model.moe.num_experts / self.shape.ffn_ranks
        rows = self.micro_batch_tokens * self.model.moe.top_k / self.shape.ffn_ranks * self.uneven
        return ffn_side(
            self.model,
            self.pool,
            self.task.cluster.network,
            rows=np.array(rows),
            experts_per_rank=math.ceil(experts),
            tensor_parallel=1,
            recompute=self.shape.ffn_lever[0],
        )

    @cached_property
    def packing(self) -> float:
        """Seconds of a layer on an attention GPU, each direction."""
        tokens = self.micro_batch_tokens / self.shape.attention_gpus
        numbers = packing_numbers(self.model, copies=self.rows.packed[0])
        seconds = float(Timer(self.pool.gpu).memory(numbers * tokens * self.width))
        return seconds * self.pool.gpu.calibration.attention

    @property
    def nodes(self) -> float:
        """That a block lies on, broken where it doesn't fill them."""
        s = self.shape
        block = s.attention_gpus + s.ffn_ranks if s.nics is None else 2 * s.nics
        return block / self.pool.gpus_per_node

    @cached_property
    def rows(self) -> Rows:
        """That a token sends, and that are handed on inside the receivers' nodes."""
        moe, s = self.model.moe, self.shape
        one = np.ones(1)
        if s.dispatch == "per-expert":
            return Rows(one * moe.top_k, one * 0.0)
        ranks = _parts(moe, s.ffn_ranks)
        if s.dispatch == "per-rank":
            return Rows(one * ranks, one * 0.0)
        nodes = min(ranks, _parts(moe, max(1, math.ceil(self.nodes))))
        return Rows(one * nodes, one * (ranks - nodes))

    @cached_property
    def transfers(self) -> tuple[float, float, float]:
        """Seconds of an M2N, an N2M and a lane."""
        key = replace(self.shape, recompute_attention=Recompute.NONE, ffn_lever=FFN_LEVERS[0], tail_share=0.0)
        if key not in self.shared.transfers:
            self.shared.transfers[key] = self._transfers()
        return self.shared.transfers[key]

    def _transfers(self) -> tuple[float, float, float]:
        s, network = self.shape, self.task.cluster.network
        per_node = self.pool.gpus_per_node
        nodes = self.nodes
        block = nodes * per_node
        inside = max(0.0, 1 - 1 / nodes)
        if s.groups == 1:
            between = inside
        elif block * s.groups <= per_node:
            between = 0.0
        else:
            between = 1.0 if nodes >= 1 else 1 / math.floor(1 / nodes)
        one = np.ones(1)
        span = one * max(1, math.ceil(nodes))
        geometry = Geometry(
            fits=np.ones(1, np.bool_),
            attention_nodes=np.ones(1, np.int64),
            ffn_nodes_in_all=np.ones(1, np.int64),
            attention_per_node=one,
            ffn_per_node=one,
            m2n_off=one * inside,
            n2m_off=one * between,
            lane_off=one * (between if s.groups > 1 else 0.0),
            ffn_nodes=np.ones(1, np.int64),
            m2n_span=span,
            n2m_span=2 * span,
        )
        nics = node_nic_rate(self.pool, network) / per_node * block / 2
        ends = Ends(
            attention_gpus=one * s.attention_gpus,
            ffn_gpus=one * s.ffn_ranks,
            attention_nic=one * nics / s.attention_gpus,
            ffn_nic=one * nics / s.ffn_ranks,
        )
        moved = volumes(
            self.model,
            geometry,
            self.rows,
            tokens=one * self.micro_batch_tokens,
            attention_groups=one * s.groups,
            width=self.width,
        )
        times = transfer_times(
            moved,
            geometry,
            ends,
            attention_pool=self.pool,
            ffn_pool=self.pool,
            network=network,
            imbalance=self.task.imbalance,
        )
        return float(times.m2n[0]), float(times.n2m[0]), float(times.lane[0])

    @cached_property
    def costs(self) -> LayeredCosts:
        """For builders and the event engine."""
        m2n, n2m, lane = self.transfers
        a, f = self.attention, self.ffn

        def every(attention: Floats, ffn: Floats, extra: float) -> tuple[float, ...]:
            times = np.full(2 * self.model.num_moe_layers + 1, float(ffn))
            times[0::2] = attention
            times[0:-1:2] += extra
            return tuple(times.tolist())

        return LayeredCosts.of(
            forward=every(a.forward, f.forward, self.packing),
            backward=every(a.backward, f.backward, self.packing),
            weight=every(a.weight, f.weight, 0.0),
            again=every(a.again, f.again, 0.0),
            m2n=m2n,
            n2m=n2m,
            lane=lane,
        )

    def estimate(self, *, place: bool = False) -> float:
        """About how long the pipeline takes: the busiest of compute and ports, or what the live activations allow.

        ``place``: layers make up for the output layer, and a lane counts both ways. Without, as the figures were made.
        """
        m2n, n2m, lane = self.transfers
        a, f = self.attention, self.ffn
        v, n = self.layers_of_group, self.micro_batches
        attention = float(a.forward[1:-1].mean() + a.backward[1:-1].mean()) + 2 * self.packing
        ffn = float(f.forward + f.backward)
        again = 3 if self.shape.ffn_lever[1] else 2
        port = (again - 1) * m2n + n2m + lane * (2 if place else 1)
        tail = float(a.forward[-1] + a.backward[-1])
        path = attention + ffn + 2 * (m2n + n2m)
        whole = self.model.num_moe_layers * path
        work = n * (v * max(attention, ffn, port) + tail / (1 if self.shape.groups == 1 else 2))
        if place:
            work = n * max(v * max(ffn, port), (self.model.num_moe_layers * attention + tail) / self.shape.groups)
        waits = n * v * whole / 2 / max(self.most_live, 1)
        groups = self.shape.groups
        # interleaved orders with groups of 2p micro-batches; below that the builders' orders soon fall behind
        wanted = min(2 * (v - 1) * groups + 4 * groups + 1, n * v)
        short = max(1.0, wanted / max(self.most_live, 1)) ** _CAPPED
        return (max(work, waits) + (groups - 0.5) * path) * short

    @property
    def held(self) -> float:
        """Parameters on the fullest attention GPU."""
        s = self.shape
        key = (s.groups, s.tensor_parallel, self.placement.attention if s.tail_share else ())
        if key not in self.shared.held:
            parameters = attention_parameters(self.model)
            of_groups = parameters.of_placement(self.placement.attention, tensor_parallel=s.tensor_parallel)
            self.shared.held[key] = float(of_groups.max())
        return self.shared.held[key]

    def fixed_and_kept(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Bytes on an attention and on an FFN GPU: what is always there, and what a live micro-batch-layer keeps."""
        s, model, c = self.shape, self.model, self.task.constants
        state = state_level(self.pool.gpu.dtype, c.bytes_per_parameter)
        whole = state.weight + state.gradient
        a_copies = s.attention_ranks * s.context_parallel * s.replicas
        a_state = self.held * (whole + state.optimizer / a_copies)
        experts = self.layers_of_group * math.ceil(model.moe.num_experts / s.ffn_ranks) * model.num_expert_parameters
        f_state = experts * (whole + state.optimizer / s.replicas)
        packed, handed = float(self.rows.packed[0]), float(self.rows.handed_on[0])
        message = self.micro_batch_tokens * packed * model.hidden_size * self.width
        received = message * (packed + handed) / packed
        lane = self.micro_batch_tokens * model.hidden_size * self.width if s.groups > 1 else 0.0
        a_fixed = a_state + self.attention.workspace + self.attention.tail_workspace
        a_fixed += (MESSAGES * message + LANES * lane) / s.attention_gpus
        f_fixed = f_state + float(self.ffn.workspace) + MESSAGES * received * self.uneven / s.ffn_ranks
        pairs = self.micro_batch_tokens * model.moe.top_k * PAIR_BYTES / s.ffn_ranks
        f_kept = pairs if s.ffn_lever[1] else float(self.ffn.kept)
        return (a_fixed, float(self.attention.kept[:-1].mean())), (f_fixed, f_kept)

    @cached_property
    def most_live(self) -> int:
        """Micro-batch-layers that fit on either side; below 0 where nothing does."""
        usable = self.pool.gpu.usable_bytes
        return min(int((usable - fixed) // kept) for fixed, kept in self.fixed_and_kept())

    @property
    def synchronise_seconds(self) -> float:
        """Reducing gradients and the optimizer's step, as for the baselines."""
        s, model, c = self.shape, self.model, self.task.constants
        state = state_level(self.pool.gpu.dtype, c.bytes_per_parameter)
        held = self.held
        experts = self.layers_of_group * model.moe.num_experts * model.num_expert_parameters / s.ffn_ranks
        a_copies, per = s.attention_ranks * s.context_parallel * s.replicas, state.gradient + state.weight
        node = node_nic_rate(self.pool, self.task.cluster.network)
        per_node = self.pool.gpus_per_node
        a_moved = held * per * (a_copies - 1) / a_copies
        f_moved = experts * per * (s.replicas - 1) / s.replicas
        f_share = s.ffn_ranks / (s.ffn_ranks + s.attention_gpus) * per_node
        a_off, f_off = (a_moved if a_copies > per_node else 0.0) * s.tensor_parallel, f_moved * f_share
        a_load, f_load = self._spine_loads
        off = max(a_off + f_off, a_off * a_load + f_off * f_load)
        step = Timer(self.pool.gpu).memory(max(held / a_copies, experts / s.replicas))
        return off / node + 2 * state.total * float(step) + self.task.cluster.step_overhead_s

    @property
    def _spine_loads(self) -> tuple[float, float]:
        """``rings.spine_load`` of attention, whose copies are on every node of a block, and of experts."""
        s, network = self.shape, self.task.cluster.network
        block = s.attention_gpus + s.ffn_ranks
        span, alike = (np.array([-(-gpus // self.pool.gpus_per_node)]) for gpus in (s.groups * block, block))
        replicas = np.array([s.replicas])
        loads = [spine_load(network, span=span, alike=each, replicas=replicas) for each in (alike, np.ones_like(span))]
        return float(loads[0][0]), float(loads[1][0])


def _parts(moe: MixtureOfExperts, parts: int) -> float:
    """Different ranks (or nodes) among a token's experts; as if experts were drawn alone where they don't divide."""
    if moe.num_experts % parts == 0:
        return expected_parts(moe, parts)
    return float(parts * (1 - (1 - 1 / parts) ** moe.top_k))
