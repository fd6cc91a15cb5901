"""Bytes of each transfer by dispatch mode and layout, and how long the busiest port needs for them.

Legend: T tokens of a micro-batch over all M attention ranks, h hidden, k top-k, N FFN ranks of a group.

Rows that a token sends: ``per-expert`` k, ``per-rank`` one per FFN rank that holds any of its experts, ``per-node`` one
per node that does; there it is handed on over NVLink. Beside the rows go a probability and an index per (token,
expert). N2M carries as many rows, and every gradient is shaped like what it answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_disagmoe.planner.activations import PAIR_BYTES
from megatron_disagmoe.planner.allocation import DispatchMode
from megatron_disagmoe.planner.arrays import Floats
from megatron_disagmoe.planner.cluster_spec import Network, Pool
from megatron_disagmoe.planner.layout import Geometry
from megatron_disagmoe.planner.model_spec import MixtureOfExperts, ModelSpec
from megatron_disagmoe.planner.routing import expected_parts

_MAX_SPLITS = 4096

#: Index of a row beside each (token, expert) pair on the lane, so that A(i + 1) can add rows up.
LANE_INDEX_BYTES = 8


@dataclass(frozen=True)
class Rows:
    """Rows per token: what an A rank packs and sends, and what is handed on inside the receivers' nodes."""

    packed: Floats
    handed_on: Floats


def rows_per_token(moe: MixtureOfExperts, mode: DispatchMode, *, ffn_ranks: ArrayLike, ffn_nodes: ArrayLike) -> Rows:
    """Expected rows under even routing; NaN for ``per-node`` where nodes hold different numbers of ranks."""
    ranks = _parts(moe, ffn_ranks)
    if mode == "per-expert":
        return Rows(np.full(ranks.shape, float(moe.top_k)), np.zeros(ranks.shape))
    if mode == "per-rank":
        return Rows(ranks, np.zeros(ranks.shape))
    nodes = _parts(moe, ffn_nodes)
    return Rows(nodes, ranks - nodes)


def _parts(moe: MixtureOfExperts, parts: ArrayLike) -> Floats:
    """``expected_parts`` of an array; NaN where the experts do not divide."""
    parts = np.asarray(parts)
    values, inverse = np.unique(parts, return_inverse=True)
    table = [expected_parts(moe, n) if n > 0 and moe.num_experts % n == 0 else np.nan for n in values.tolist()]
    return np.array(table)[inverse].reshape(parts.shape)


@dataclass(frozen=True)
class Volumes:
    """Bytes of one M2N, N2M and lane of one micro-batch, all ranks of a group together.

    ``off``: what leaves its node. ``on``: what stays, and what is handed on inside the receiver's nodes.
    """

    m2n_off: Floats
    m2n_on: Floats
    n2m_off: Floats
    n2m_on: Floats
    lane_off: Floats
    lane_on: Floats


def volumes(
    model: ModelSpec, geometry: Geometry, rows: Rows, *, tokens: ArrayLike, attention_groups: ArrayLike, width: int
) -> Volumes:
    """Bytes; ``tokens``: T. ``width``: bytes of a number."""
    tokens = np.asarray(tokens, dtype=np.float64)
    row = model.hidden_size * width
    hidden, handed = tokens * rows.packed * row, tokens * rows.handed_on * row
    pairs = tokens * model.moe.top_k * PAIR_BYTES
    residual = tokens * row * (1 + bool(model.moe.shared_ffn_hidden_size)) + tokens * rows.packed * LANE_INDEX_BYTES
    lane = np.where(np.asarray(attention_groups) > 1, residual, 0.0)
    m2n, n2m, off = hidden + pairs, hidden, geometry
    return Volumes(
        m2n_off=m2n * off.m2n_off,
        m2n_on=m2n * (1 - off.m2n_off) + handed,
        n2m_off=n2m * off.n2m_off,
        n2m_on=n2m * (1 - off.n2m_off) + handed,
        lane_off=lane * off.lane_off,
        lane_on=lane * (1 - off.lane_off),
    )


@dataclass(frozen=True)
class Ends:
    """GPUs of the two groups at the ends of a transfer and the bytes per second that each one's NIC share moves."""

    attention_gpus: Floats
    ffn_gpus: Floats
    attention_nic: Floats
    ffn_nic: Floats


@dataclass(frozen=True)
class TransferTimes:
    """Seconds that a transfer of one micro-batch takes a group's port."""

    m2n: Floats
    n2m: Floats
    lane: Floats


def transfer_times(
    volumes: Volumes,
    geometry: Geometry,
    ends: Ends,
    *,
    attention_pool: Pool,
    ffn_pool: Pool,
    network: Network,
    imbalance: float = 1.0,
) -> TransferTimes:
    """The slower end decides; NVLink and NICs work side by side.

    ``imbalance``: what the busiest FFN rank gets, over the mean.
    """
    rails = max(attention_pool.nics_per_node, ffn_pool.nics_per_node)
    m2n_spine = _spine_factor(network, rails, geometry.m2n_span, geometry.m2n_off)
    n2m_spine = _spine_factor(network, rails, geometry.n2m_span, geometry.n2m_off)

    def one(off: Floats, on: Floats, spine: Floats) -> Floats:
        at_a = np.maximum(off * spine / ends.attention_nic, on / nvlink_rate(attention_pool)) / ends.attention_gpus
        at_f = np.maximum(off * spine / ends.ffn_nic, on / nvlink_rate(ffn_pool)) / ends.ffn_gpus
        return np.maximum(at_a, imbalance * at_f) * network.calibration + _latency(network, off)

    lane = np.maximum(volumes.lane_off * n2m_spine / ends.attention_nic, volumes.lane_on / nvlink_rate(attention_pool))
    there = volumes.lane_off + volumes.lane_on > 0
    return TransferTimes(
        m2n=one(volumes.m2n_off, volumes.m2n_on, m2n_spine),
        n2m=one(volumes.n2m_off, volumes.n2m_on, n2m_spine),
        lane=np.where(
            there, lane / ends.attention_gpus * network.calibration + _latency(network, volumes.lane_off), 0.0
        ),
    )


def nvlink_rate(pool: Pool) -> float:
    """Bytes per second a GPU moves to the GPUs of its node, one way."""
    return pool.nvlink_gb_per_s * 1e9 * pool.nvlink_efficiency


def node_nic_rate(pool: Pool, network: Network) -> float:
    """Bytes per second a node moves to others, one way; infinite on a machine alone, where nothing leaves it."""
    gbit = sum(pool.nics_gbit_per_s)
    return gbit / 8 * 1e9 * network.efficiency if gbit else np.inf


def _latency(network: Network, off: Floats) -> Floats:
    return np.where(off > 0, network.latency_us, network.local_latency_us) * 1e-6


def _spine_factor(network: Network, rails: int, span: Floats, off: Floats) -> Floats:
    """How much longer traffic that leaves nodes takes where the spine is oversubscribed, at least 1.

    ``span``: nodes of both ends; ``off``: the share of all traffic that leaves its node. Of what leaves it, the share
    that climbs to the spine is what goes to other leaves. Where ends lie on different nodes (all leaves) and not on one
    leaf, some port gets everything through the spine; where each node holds a part of both, a node's traffic goes to
    the others alike, of which k - 1 are on its leaf of k. And without forwarding to the right rail first, what goes to
    other rails climbs too.
    """
    share = np.zeros(np.shape(span))
    if leaf := network.nodes_per_leaf:
        alike = np.maximum(0.0, 1 - (leaf - 1) / np.maximum(np.asarray(span) - 1, 1))
        share = np.where(np.asarray(span) <= leaf, 0.0, np.where(off >= 1, 1.0, alike))
    if network.rail_optimised and not network.cross_rail_forwarding and rails > 1:
        share = np.maximum(share, 1 - 1 / rails)
    return np.maximum(1.0, share * network.oversubscription)


@dataclass(frozen=True)
class NicSplit:
    """How many of a node's NICs carry each side's traffic, and their bytes per second."""

    attention: int
    ffn: int
    attention_rate: float
    ffn_rate: float


def nic_splits(pool: Pool, network: Network) -> tuple[NicSplit, ...]:
    """Every split of a node's NICs by the bandwidth it gives the attention side; NICs of one speed are alike.

    Empty where there are fewer than two NICs: they cannot be split.

    Raises:
        ValueError: the NICs have so many different speeds that the splits cannot be listed.
    """
    fewest: dict[float, int] = {0.0: 0}  # NICs that give the attention side a bandwidth
    for speed in sorted(pool.nics_gbit_per_s, reverse=True):
        for rate, used in list(fewest.items()):
            fewest[rate + speed] = min(used + 1, fewest.get(rate + speed, used + 1))
        if len(fewest) > _MAX_SPLITS:
            raise ValueError(
                f"pools.{pool.name}.nics_gbit_per_s: more than {_MAX_SPLITS} ways to split them; round the speeds"
            )
    total, count = sum(pool.nics_gbit_per_s), pool.nics_per_node
    unit = 1e9 / 8 * network.efficiency
    return tuple(
        NicSplit(used, count - used, rate * unit, (total - rate) * unit)
        for rate, used in sorted(fewest.items())
        if 0 < used < count
    )
