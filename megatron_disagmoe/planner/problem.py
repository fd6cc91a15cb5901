"""One planning problem, and what its candidates share: stage costs by cut and lever, parameters by depth.

Legend: L MoE layers, c a cut (TP, CP) of an attention rank, r a recomputation level, p a number of groups. Stage i of a
side lies on group i mod p; v is a group's number of MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import Job
from megatron_disagmoe.planner.arrays import Floats, Ints
from megatron_disagmoe.planner.attention_side import AttentionSizes, attention_side, stage_table
from megatron_disagmoe.planner.cluster_spec import Cluster, Pool
from megatron_disagmoe.planner.ffn_side import ffn_side
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.operations import packing_numbers
from megatron_disagmoe.planner.space import FFN_LEVERS, Space
from megatron_disagmoe.planner.states import StateBytes, attention_parameters
from megatron_disagmoe.planner.timing import Timer
from megatron_disagmoe.planner.traffic import NicSplit, nic_splits, node_nic_rate

#: Depths beyond this are not searched.
MAX_GROUPS = 256


@dataclass(frozen=True)
class Problem:
    """What is to be planned: attention on one pool of the cluster, FFN on one (mostly the same)."""

    model: ModelSpec
    cluster: Cluster
    job: Job
    space: Space
    state: StateBytes
    attention_pool_index: int = 0
    ffn_pool_index: int = 0

    @property
    def attention_pool(self) -> Pool:
        return self.cluster.pools[self.attention_pool_index]

    @property
    def ffn_pool(self) -> Pool:
        return self.cluster.pools[self.ffn_pool_index]

    @property
    def one_pool(self) -> bool:
        return self.attention_pool_index == self.ffn_pool_index

    @property
    def num_layers(self) -> int:
        """L."""
        return self.model.num_moe_layers

    @property
    def max_gpus(self) -> int:
        """Most GPUs that a plan may use."""
        pools = {self.attention_pool_index, self.ffn_pool_index}
        have = sum(self.cluster.pools[index].num_gpus for index in pools)
        return min(have, self.space.max_gpus or have)

    @property
    def max_groups(self) -> int:
        """Most groups of a side."""
        return max(1, min(self.num_layers, self.max_gpus - 1, MAX_GROUPS))

    @cached_property
    def nics(self) -> tuple[NicSplit, ...]:
        """How a node's NICs may be split where sides share nodes; one entry of equal shares where they may not."""
        pool, network = self.attention_pool, self.cluster.network
        splits = nic_splits(pool, network) if network.shared_nics else ()
        return splits or (NicSplit(0, 0, 0.0, 0.0),)

    @cached_property
    def attention(self) -> AttentionTables:
        """Costs of the attention side."""
        return AttentionTables.of(self)

    @cached_property
    def ffn(self) -> FfnTables:
        """Costs of the FFN side."""
        return FfnTables.of(self)

    def packing_seconds(self, rows: Floats, tokens: Floats) -> Floats:
        """Packing and unpacking of one layer on an attention GPU that holds ``tokens``; backward takes as long."""
        pool = self.attention_pool
        numbers = packing_numbers(self.model, copies=rows)
        seconds = Timer(pool.gpu).memory(numbers * tokens * pool.gpu.bytes_per_number)
        return seconds * pool.gpu.calibration.attention

    def node_rates(self) -> tuple[float, float]:
        """Bytes per second that a node of either side moves to others."""
        network = self.cluster.network
        return node_nic_rate(self.attention_pool, network), node_nic_rate(self.ffn_pool, network)


def divisors(number: int) -> list[int]:
    """In increasing order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


@dataclass(frozen=True)
class Depths:
    """By number of attention groups p (row p - 1): groups that may take longest, with what they hold.

    ``busiest``: [p, K] groups; those left out never decide a step's time. ``layers``: their MoE layers.
    """

    busiest: Ints
    layers: Ints


@dataclass(frozen=True)
class AttentionTables:
    """Seconds and bytes on an attention GPU.

    ``forward``, ``backward``, ``weight``, ``again``: [c, r, L + 1], by stage; ``forward_before`` etc.: [c, r, L + 2],
    summed over the stages before. ``group_work``: [c, r, p, K], a micro-batch's work on the groups of ``depths``.
    ``kept``: [c, r, L + 1], bytes that a micro-batch keeps in a stage; ``kept_first``, ``kept_tail``: [c, r, p], their
    means over the layers of group 0 and of the tail's group; ``parameters_first``, ``parameters_tail``: [c, p].
    ``workspace``: [c, r]; ``tail_workspace``: [c].
    """

    cuts: tuple[tuple[int, int], ...]
    depths: Depths
    forward: Floats
    backward: Floats
    weight: Floats
    again: Floats
    forward_before: Floats
    backward_before: Floats
    inputs_before: Floats
    group_work: Floats
    kept_first: Floats
    kept_tail: Floats
    kept: Floats
    tail_kept: Floats
    parameters_first: Floats
    parameters_tail: Floats
    parameters_most: Floats
    workspace: Floats
    tail_workspace: Floats

    @property
    def gpus_per_rank(self) -> Ints:
        """TP CP of every cut."""
        return np.array([tp * cp for tp, cp in self.cuts])

    @property
    def context_parallel(self) -> Ints:
        return np.array([cp for _, cp in self.cuts])

    @classmethod
    def of(cls, problem: Problem) -> AttentionTables:
        """Tables for every cut that model and nodes allow."""
        cuts = allowed_cuts(problem)
        model, job, pool = problem.model, problem.job, problem.attention_pool
        table = stage_table(model, sequence=job.sequence_length)
        sides = [
            [
                attention_side(
                    model,
                    pool,
                    problem.cluster.network,
                    table=table,
                    sizes=AttentionSizes(job.sequence_length, job.micro_batch_size, tp, cp, recompute),
                )
                for recompute in Recompute
            ]
            for tp, cp in cuts
        ]

        def stack(name: str) -> Floats:
            return np.array([[getattr(side, name) for side in row] for row in sides])

        forward, backward, weight, kept = stack("forward"), stack("backward"), stack("weight"), stack("kept")
        layers = problem.num_layers
        work, group_kept, tail_group_kept = _by_depth(forward + backward, kept, problem.max_groups)
        depths = _busiest(work, layers)
        held = attention_parameters(model)
        parameters = [
            [held.of_groups(p, tensor_parallel=tp) for p in range(1, problem.max_groups + 1)]
            for tp, _ in cuts
        ]
        rows = np.arange(problem.max_groups)[:, None]
        return cls(
            cuts=cuts,
            depths=depths,
            forward=forward,
            backward=backward,
            weight=weight,
            again=stack("again"),
            forward_before=_before(forward),
            backward_before=_before(backward),
            inputs_before=_before(backward - weight),
            group_work=work[:, :, rows, depths.busiest],
            kept_first=group_kept,
            kept_tail=tail_group_kept,
            kept=kept,
            tail_kept=kept[:, :, -1],
            parameters_first=np.array([[each[0] for each in row] for row in parameters]),
            parameters_tail=np.array([[each[layers % len(each)] for each in row] for row in parameters]),
            parameters_most=np.array([[each.max() for each in row] for row in parameters]),
            workspace=stack("workspace"),
            tail_workspace=stack("tail_workspace")[:, 0],
        )


def allowed_cuts(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Every (TP, CP) whose ranks fit a node, whose heads divide and whose sequence can be cut."""
    attention, job, node = problem.model.attention, problem.job, problem.attention_pool.gpus_per_node
    cuts = [
        (tp, cp)
        for tp in problem.space.tensor_parallel
        for cp in problem.space.context_parallel
        if tp <= attention.tensor_parallel_limit
        and attention.num_heads % tp == 0
        and attention.num_query_groups % tp == 0
        and node % (tp * cp) == 0
        and (cp == 1 or job.sequence_length % (2 * cp) == 0)
        and (tp == 1 or job.sequence_length % (tp * cp) == 0)
    ]
    if not cuts:
        raise ValueError(
            f"no tensor_parallel among {problem.space.tensor_parallel} with context_parallel among "
            f"{problem.space.context_parallel} fits {attention.num_heads} heads, {attention.num_query_groups} "
            f"key/value heads, {job.sequence_length} tokens and nodes of {node} GPUs"
        )
    return tuple(cuts)


def _before(values: Floats) -> Floats:
    """Sums over the entries before, along the last axis; one entry longer."""
    return np.concatenate((np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)), axis=-1)


def _by_depth(work: Floats, kept: Floats, most: int) -> tuple[Floats, Floats, Floats]:
    """[c, r, p, g] work of every group; [c, r, p] mean bytes kept by the MoE layers of group 0 and the tail's group."""
    layers = work.shape[-1] - 1
    total = np.zeros((*work.shape[:2], most, most))
    first = np.zeros((*work.shape[:2], most))
    tail = np.zeros_like(first)
    for p in range(1, most + 1):
        padding = np.zeros((*work.shape[:2], -(layers + 1) % p))
        rounds = np.concatenate((work, padding), axis=-1).reshape(*work.shape[:2], -1, p)
        total[:, :, p - 1, :p] = rounds.sum(axis=2)
        first[:, :, p - 1] = kept[:, :, 0:layers:p].mean(axis=-1)
        tail[:, :, p - 1] = kept[:, :, layers % p : layers : p].mean(axis=-1)
    return total, first, tail


def _busiest(work: Floats, layers: int) -> Depths:
    """Groups of every depth that no later group with as many layers and as much work, whatever cut and lever, outdoes.

    A later group starts later and has longer to go at the end, so an outdone one never decides. Groups with one layer
    more come first.
    """
    found: list[list[int]] = []
    for p in range(1, work.shape[2] + 1):
        keep: list[int] = []
        rest = layers % p
        for start, end in ((0, rest), (rest, p)):
            mine = work[:, :, p - 1, start:end]
            later = np.maximum.accumulate(mine[..., ::-1], axis=-1)[..., ::-1]
            outdone = (mine[..., :-1] <= later[..., 1:]).all(axis=(0, 1))
            keep += [start + int(g) for g in np.flatnonzero(~outdone)] + [end - 1] * (end > start)
        found.append(keep)
    width = max(len(keep) for keep in found)
    busiest = np.array([keep + keep[-1:] * (width - len(keep)) for keep in found])
    depth = np.arange(1, len(found) + 1)[:, None]
    return Depths(busiest=busiest, layers=(layers - 1 - busiest) // depth + 1)


_FFN_COLUMNS = ("forward", "backward", "weight", "again", "kept", "workspace")


@dataclass(frozen=True)
class FfnTables:
    """Seconds and bytes on an FFN GPU: [lever, M, N, ETP].

    ``attention_ranks``, ``ffn_ranks``, ``cuts``: the M, N and ETP of the axes; ``kept`` is 0 where tokens are
    dispatched again.
    """

    attention_ranks: Ints
    ffn_ranks: Ints
    cuts: Ints
    forward: Floats
    backward: Floats
    weight: Floats
    again: Floats
    kept: Floats
    workspace: Floats

    @classmethod
    def of(cls, problem: Problem) -> FfnTables:
        """Tables for every M that divides the batch and every N that divides the experts."""
        space, job, moe = problem.space, problem.job, problem.model.moe
        m = _chosen(divisors(job.global_batch_size // job.micro_batch_size), space.attention_ranks, "attention_ranks")
        n = _chosen(divisors(moe.num_experts), space.ffn_ranks, "ffn_ranks")
        node = problem.ffn_pool.gpus_per_node
        fits = [e for e in divisors(node) if moe.num_experts and problem.model.moe.ffn_hidden_size % e == 0]
        cuts = _chosen(fits, space.expert_tensor_parallel, "expert_tensor_parallel")
        rows = job.tokens_per_rank * moe.top_k * m[:, None] / n[None, :] * job.imbalance
        columns: dict[str, list[Floats]] = {name: [] for name in _FFN_COLUMNS}
        for recompute, again in FFN_LEVERS:
            sides = [
                ffn_side(
                    problem.model,
                    problem.ffn_pool,
                    problem.cluster.network,
                    rows=rows,
                    experts_per_rank=moe.num_experts / n[None, :],
                    tensor_parallel=cut,
                    recompute=recompute,
                )
                for cut in cuts.tolist()
            ]
            for name, column in columns.items():
                table = np.stack([getattr(side, name) for side in sides], axis=-1)
                column.append(np.zeros_like(table) if again and name == "kept" else table)
        return cls(m, n, cuts, **{name: np.array(column) for name, column in columns.items()})


def _chosen(possible: list[int], asked: tuple[int, ...] | None, name: str) -> Ints:
    chosen = [value for value in possible if asked is None or value in asked]
    if not chosen:
        raise ValueError(f"{name}: none of {list(asked or ())} is possible; possible are {possible}")
    return np.array(chosen, np.int64)
