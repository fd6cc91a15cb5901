"""What of a gradient reduction climbs to the spine of a network.

Copies of a parameter are reduced on their node first, then in a ring over the nodes that hold them, leaf by leaf. So of
the nodes of one ring on one leaf only one sends to another leaf, and nobody does where a leaf has the whole ring.
"""

from __future__ import annotations

import functools

import numpy as np

from megatron_disagmoe.planner.arrays import Floats, Ints
from megatron_disagmoe.planner.cluster_spec import Network


def spine_load(network: Network, *, span: Ints, alike: Ints, replicas: Ints) -> Floats:
    """Time that the busiest leaf's way to the spine takes, over what the nodes' NICs take; 0 where nothing climbs.

    Args:
        network: its ``nodes_per_leaf`` (0: one leaf has all nodes) and ``oversubscription``.
        span: nodes of one replica.
        alike: neighbouring nodes of a replica that hold the same parameters, so that they are in the same rings.
        replicas: which follow each other on nodes.
    """
    leaf = network.nodes_per_leaf
    if not leaf or network.oversubscription == 1:
        return np.zeros(len(span))
    cases, which = np.unique(np.stack([span, alike, replicas]), axis=1, return_inverse=True)
    climbing = [_climbing(*case, leaf) for case in cases.T.tolist()]
    return network.oversubscription * np.array(climbing)[which.reshape(-1)] / leaf


@functools.lru_cache(maxsize=4096)
def _climbing(span: int, alike: int, replicas: int, leaf: int) -> int:
    """The most rings that leave one leaf.

    Raises:
        ValueError: sizes below 1.
    """
    if min(span, alike, replicas, leaf) < 1:
        raise ValueError(f"{replicas} replicas of {span} nodes, {alike} alike, leaves of {leaf}: each is at least 1")
    nodes = np.arange(span * replicas)
    on_leaf = np.unique(np.stack([nodes // leaf, nodes % span // alike]), axis=1)
    leaves_of_ring = np.bincount(on_leaf[1])
    leaving = on_leaf[0][leaves_of_ring[on_leaf[1]] > 1]
    return int(np.bincount(leaving).max()) if len(leaving) else 0
