"""How long one GPU takes for one operation: peak rates times achieved efficiency. Seconds, FLOPs, bytes.

Every function takes numbers or NumPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from megatron_disagmoe.planner.arrays import Floats
from megatron_disagmoe.planner.cluster_spec import Curve, Gpu


def interpolate(curve: Curve, size: ArrayLike) -> Floats:
    """The curve at ``size``, linear in log(size), flat beyond both ends."""
    sizes, values = np.array(curve, dtype=np.float64).T
    return np.asarray(np.interp(np.log(np.maximum(size, sizes[0])), np.log(sizes), values))


@dataclass(frozen=True)
class Timer:
    """Times of operations on one ``gpu``."""

    gpu: Gpu

    @cached_property
    def _memory_rate(self) -> float:
        return self.gpu.memory_bandwidth_gb_per_s * 1e9 * self.gpu.efficiency.memory

    @property
    def overhead(self) -> float:
        """Seconds a stage takes whatever its size."""
        return self.gpu.stage_overhead_us * 1e-6

    def gemm(self, flops: ArrayLike) -> Floats:
        """One dense matrix product."""
        ideal = np.asarray(flops) / self.gpu.peak_flops
        return ideal / interpolate(self.gpu.efficiency.gemm, ideal * 1e6)

    def grouped_gemm(self, flops: ArrayLike, *, tokens_per_expert: ArrayLike) -> Floats:
        """One product per expert, in one kernel."""
        efficiency = interpolate(self.gpu.efficiency.grouped_gemm, tokens_per_expert)
        return np.asarray(flops) / (self.gpu.peak_flops * efficiency)

    def attention(self, flops: ArrayLike, *, sequence: float, head_dim: int, backward: bool) -> Floats:
        """Scores, softmax and weighted sum of one fused kernel."""
        curves = self.gpu.efficiency.attention_curves(head_dim)
        efficiency = interpolate(curves.backward if backward else curves.forward, sequence)
        return np.asarray(flops) / (self.gpu.peak_flops * efficiency)

    def memory(self, num_bytes: ArrayLike) -> Floats:
        """Reading or writing ``num_bytes``."""
        return np.asarray(num_bytes) / self._memory_rate
