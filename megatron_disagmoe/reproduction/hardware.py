"""Two factors of the hardware, fitted to figure 6a once, and figure 5's efficiency of its own.

Figure 6a says what share of a layer's time attention, experts and all-to-alls take for Qwen3 at 4K and 32K tokens. Only
ratios are published, so two factors can be fitted: how much longer attention, and how much longer experts take than
peaks and efficiency curves say (``Gpu.calibration``), with the network as the cluster file and ``af_over_nccl`` have
it. They minimise the squared relative error over the six shares.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.reproduction.constants import SETTINGS, Constants
from megatron_disagmoe.reproduction.published import FIG5, FIG6A
from megatron_disagmoe.reproduction.systems.layer import Job, costs_of

CLUSTER = "h800-16x8"


@dataclass(frozen=True)
class Shares:
    """Of a layer's forward and backward."""

    attention: float
    ffn: float

    @property
    def communication(self) -> float:
        return 1 - self.attention - self.ffn


def shares(job: Job) -> Shares:
    """Shares of the middle layer, everything one after the other."""
    layer = costs_of(job).layers[job.model.num_moe_layers // 2]
    attention = layer.forward.attention + layer.backward.attention
    ffn = layer.forward.ffn + layer.backward.ffn
    whole = attention + ffn + layer.forward.communication + layer.backward.communication
    return Shares(attention / whole, ffn / whole)


def with_factors(cluster: Cluster, *, attention: float, ffn: float) -> Cluster:
    """``cluster`` with GPUs whose attention and experts take this much longer than peaks and curves say."""
    pools = []
    for pool in cluster.pools:
        calibration = pool.gpu.calibration.model_copy(update={"attention": attention, "ffn": ffn})
        gpu = pool.gpu.model_copy(update={"calibration": calibration})
        pools.append(pool.model_copy(update={"gpu": gpu}))
    return cluster.model_copy(update={"pools": tuple(pools)})


@dataclass(frozen=True)
class Calibration:
    """``eight_nodes``: what of the network's efficiency is left for all-to-alls over 8 nodes (figure 5 only)."""

    attention: float
    ffn: float
    eight_nodes: float

    def cluster(self, name: str = CLUSTER) -> Cluster:
        """A shipped cluster with the two factors."""
        return with_factors(load_cluster(name), attention=self.attention, ffn=self.ffn)


@functools.lru_cache(maxsize=64)
def calibrate(constants: Constants = Constants()) -> Calibration:  # noqa: B008  # frozen
    """Fit figure 6a, then figure 5's 78%."""
    base = load_cluster(CLUSTER)
    model = load_model(SETTINGS["fig6a"].model)

    def job(cluster: Cluster, sequence: int, expert_parallel: int, nccl: float) -> Job:
        return Job(model, cluster, sequence, constants.micro_batch_size, expert_parallel, nccl=nccl)

    def error(logs: np.ndarray) -> float:
        cluster = with_factors(base, attention=float(np.exp(logs[0])), ffn=float(np.exp(logs[1])))
        total = 0.0
        for sequence, (attention, ffn) in FIG6A.items():
            ours = shares(job(cluster, sequence, constants.expert_parallel, 1 / constants.af_over_nccl))
            total += (ours.attention / attention - 1) ** 2 + (ours.ffn / ffn - 1) ** 2
            total += (ours.communication / (1 - attention - ffn) - 1) ** 2
        return total

    found = minimize(error, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12})
    attention, ffn = (float(value) for value in np.exp(found.x))
    cluster = with_factors(base, attention=attention, ffn=ffn)
    sequence, nodes = SETTINGS["fig5"].sequences[0], max(FIG5)
    gpus = nodes * base.pools[0].gpus_per_node
    low, high = 0.01, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        there = shares(job(cluster, sequence, gpus, middle / constants.af_over_nccl))
        low, high = (low, middle) if there.communication < FIG5[nodes] else (middle, high)
    return Calibration(attention, ffn, (low + high) / 2)
