"""What one layer costs where experts lie on the GPUs of attention: compute from the planner's cost model, all-to-alls.

Legend: T tokens of a micro-batch on one GPU, P expert-parallel ranks, k top-k. Every GPU runs attention on its own T
tokens, sends T k rows to the experts' ranks (a 1 / P share stays where it is), computes T k rows and sends them back.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from megatron_disagmoe.planner.activations import PAIR_BYTES, Recompute, expert_bytes, logits_bytes
from megatron_disagmoe.planner.allocation import DispatchMode
from megatron_disagmoe.planner.attention_side import AttentionSizes, attention_side, stage_table
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.ffn_side import FfnSide, ffn_side
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.operations import packing_numbers
from megatron_disagmoe.planner.timing import Timer
from megatron_disagmoe.planner.traffic import node_nic_rate, nvlink_rate, rows_per_token


class Keep(enum.Enum):
    """What a baseline keeps of a layer for its backward (Megatron's recomputation options).

    ALL: everything. SELECTIVE: norms, activation functions and latent up-projections run again. MOE: so does the whole
    MoE layer with both all-to-alls. INPUT: only the layer's input is kept, all runs again.
    """

    ALL = "none"
    SELECTIVE = "selective"
    MOE = "moe"
    INPUT = "full"

    @property
    def attention(self) -> Recompute:
        """Level of the attention part."""
        return {Keep.ALL: Recompute.NONE, Keep.INPUT: Recompute.FULL}.get(self, Recompute.SELECTIVE)

    @property
    def ffn(self) -> Recompute:
        """Level of the experts."""
        return {Keep.ALL: Recompute.NONE, Keep.SELECTIVE: Recompute.SELECTIVE}.get(self, Recompute.FULL)

    @property
    def communicates_again(self) -> bool:
        """Whether the all-to-alls run again before backward."""
        return self in (Keep.MOE, Keep.INPUT)


@dataclass(frozen=True)
class Parts:
    """Seconds of one direction of a layer, in order of forward."""

    attention: float
    dispatch: float
    ffn: float
    combine: float

    @property
    def compute(self) -> float:
        return self.attention + self.ffn

    @property
    def communication(self) -> float:
        return self.dispatch + self.combine

    def without_network(self) -> Self:
        """The same with all-to-alls that take no time."""
        return replace(self, dispatch=0.0, combine=0.0)


@dataclass(frozen=True)
class Layer:
    """One MoE layer with the dense layers before it.

    ``backward`` holds gradients alone, ``again`` what of the forward runs before it once more, ``attention_weight`` and
    ``ffn_weight`` the parts of ``backward`` that make weight gradients. ``kept``: bytes from forward to backward.
    """

    forward: Parts
    backward: Parts
    again: Parts
    attention_weight: float
    ffn_weight: float
    kept: float

    @property
    def total(self) -> float:
        """Everything of a micro-batch, one after the other."""
        parts = (self.forward, self.backward, self.again)
        return sum(each.compute + each.communication for each in parts)

    def without_network(self) -> Self:
        """The same with all-to-alls that take no time."""
        return replace(
            self,
            forward=self.forward.without_network(),
            backward=self.backward.without_network(),
            again=self.again.without_network(),
        )


@dataclass(frozen=True)
class Job:
    """What a co-located system trains and how. ``nccl``: its network efficiency over the cluster's (at most 1)."""

    model: ModelSpec
    cluster: Cluster
    sequence: int
    micro_batch_size: int
    expert_parallel: int
    keep: Keep = Keep.ALL
    dispatch: DispatchMode = "per-expert"
    nccl: float = 1.0
    imbalance: float = 1.0
    tensor_parallel: int = 1
    context_parallel: int = 1

    @property
    def gpus_per_rank(self) -> int:
        """GPUs that share a data-parallel rank's micro-batch."""
        return self.tensor_parallel * self.context_parallel

    @property
    def tokens(self) -> float:
        """T."""
        return self.sequence * self.micro_batch_size / self.gpus_per_rank


@dataclass(frozen=True)
class Costs:
    """A model's layers on one GPU.

    ``tail_forward``, ``tail_backward``: output layer and loss. ``hop``: seconds of what one pipeline stage sends the
    next. ``workspace``: bytes while a layer runs; ``tail_workspace``: of the tail; ``transport``: of messages.
    """

    job: Job
    layers: tuple[Layer, ...]
    tail_forward: float
    tail_backward: float
    hop: float
    workspace: float
    tail_workspace: float
    transport: float

    def without_network(self) -> Self:
        """The same on a network that takes no time."""
        layers = tuple(layer.without_network() for layer in self.layers)
        return replace(self, layers=layers, hop=0.0)


def all_to_all_seconds(job: Job, *, rows: float, handed_on: float = 0.0, pairs: int = 0) -> float:
    """One all-to-all of ``rows`` rows a token among the P ranks, which fill P / (GPUs of a node) nodes.

    What leaves the node takes each GPU's share of the node's NICs, the rest NVLink, side by side. ``handed_on``: rows a
    token that are fanned out inside the receivers' nodes. ``pairs``: (probability, id) pairs a token.
    """
    pool, network = job.cluster.pools[0], job.cluster.network
    width = pool.gpu.bytes_per_number
    per_node = min(pool.gpus_per_node, job.expert_parallel)
    nodes = -(-job.expert_parallel // pool.gpus_per_node)
    off, on = 1 - 1 / nodes, 1 / nodes - 1 / job.expert_parallel
    if handed_on:
        on = 1 / nodes  # a row for a node goes to one of its GPUs, seldom the sender
    row = job.model.hidden_size * width
    sent = job.tokens * (rows * row + pairs * PAIR_BYTES) * job.imbalance
    local = sent * on + job.tokens * handed_on * row * job.imbalance
    seconds = local / nvlink_rate(pool)
    latency = network.local_latency_us
    if nodes > 1:
        nic = node_nic_rate(pool, network) / per_node * job.nccl
        seconds, latency = max(seconds, sent * off * spine_factor(job, nodes) / nic), network.latency_us
    return seconds * network.calibration + latency * 1e-6


def spine_factor(job: Job, nodes: int) -> float:
    """How much longer traffic among ``nodes`` nodes takes over an oversubscribed spine, as the planner has it."""
    pool, network = job.cluster.pools[0], job.cluster.network
    leaf = network.nodes_per_leaf
    share = 1 - (leaf - 1) / (nodes - 1) if 0 < leaf < nodes else 0.0
    if network.rail_optimised and not network.cross_rail_forwarding and pool.nics_per_node > 1:
        share = max(share, 1 - 1 / pool.nics_per_node)
    return max(1.0, share * network.oversubscription)


def _experts(job: Job, tokens: float) -> FfnSide:
    """A GPU's experts on what ``tokens`` a GPU send."""
    model = job.model
    return ffn_side(
        model,
        job.cluster.pools[0],
        job.cluster.network,
        rows=np.array(tokens * model.moe.top_k * job.imbalance),
        experts_per_rank=model.moe.num_experts / job.expert_parallel,
        tensor_parallel=1,
        recompute=job.keep.ffn,
    )


def expert_seconds(job: Job, tokens: float) -> float:
    """Forward of a GPU's experts where every GPU has ``tokens`` tokens."""
    return float(_experts(job, tokens).forward)


def costs_of(job: Job) -> Costs:
    """Every layer of ``job`` on one GPU."""
    model, pool, network = job.model, job.cluster.pools[0], job.cluster.network
    width, tokens = pool.gpu.bytes_per_number, job.tokens
    sizes = AttentionSizes(
        job.sequence, job.micro_batch_size, job.tensor_parallel, job.context_parallel, job.keep.attention
    )
    a = attention_side(model, pool, network, table=stage_table(model, sequence=job.sequence), sizes=sizes)
    f = _experts(job, tokens)
    received = tokens * model.moe.top_k * job.imbalance
    nodes = -(-job.expert_parallel // pool.gpus_per_node)
    rows = rows_per_token(model.moe, job.dispatch, ffn_ranks=job.expert_parallel, ffn_nodes=nodes)
    packed, handed = float(rows.packed), float(rows.handed_on)
    dispatch = all_to_all_seconds(job, rows=packed, handed_on=handed, pairs=model.moe.top_k)
    combine = all_to_all_seconds(job, rows=packed, handed_on=handed)
    packing = float(Timer(pool.gpu).memory(packing_numbers(model, copies=np.array(packed)) * tokens * width))
    packing *= pool.gpu.calibration.attention
    again = float(job.keep.communicates_again)
    row = expert_bytes(model, recompute=job.keep.ffn, width=width)
    f_kept = tokens * model.hidden_size * width if job.keep is Keep.MOE else 0.0
    f_kept = f_kept if job.keep.communicates_again else row * received
    layers = []
    for stage in range(model.num_moe_layers):
        a_again, f_again = float(a.again[stage]), float(f.again)
        layers.append(
            Layer(
                forward=Parts(float(a.forward[stage]) + packing, dispatch, float(f.forward), combine),
                backward=Parts(
                    float(a.backward[stage]) - a_again + packing, dispatch, float(f.backward) - f_again, combine
                ),
                again=Parts(a_again + packing * again, dispatch * again, f_again, combine * again),
                attention_weight=float(a.weight[stage]),
                ffn_weight=float(f.weight),
                kept=float(a.kept[stage]) + f_kept,
            )
        )
    hidden = tokens * model.hidden_size * width
    nic = node_nic_rate(pool, network) / pool.gpus_per_node * job.nccl
    return Costs(
        job=job,
        layers=tuple(layers),
        tail_forward=float(a.forward[-1]),
        tail_backward=float(a.backward[-1]),
        hop=hidden / nic * network.calibration + network.latency_us * 1e-6,
        workspace=a.workspace + float(f.workspace),
        tail_workspace=logits_bytes(model, width=width) * tokens,
        transport=2 * hidden * (packed + handed) * job.imbalance,
    )
