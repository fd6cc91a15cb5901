"""What the planner needs to know of a machine room: GPUs, nodes, links, fabric.

Bandwidths are per direction. NIC speeds are in Gbit/s as they are sold, everything else in GB/s (1e9 bytes).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megatron_disagmoe.planner.files import (
    Count,
    CountOrZero,
    Fraction,
    Quantity,
    QuantityOrZero,
    Strict,
    find_config,
    increasing,
    read_mapping,
)

#: Of a cluster; more is a slip of the pen.
MOST_GPUS = 1_000_000

Curve = Annotated[tuple[tuple[float, float], ...], AfterValidator(increasing)]


class AttentionCurves(Strict):
    """Of one head dimension; see ``Efficiency``."""

    forward: Curve
    backward: Curve


class Efficiency(Strict):
    """Achieved over peak, each curve read at log(size) and flat beyond its ends.

    ``gemm``: size = ideal microseconds (FLOPs / peak) of one matrix product.
    ``grouped_gemm``: size = tokens per expert in one grouped product.
    ``attention``: by head dimension (the largest that a model's head reaches counts, else the smallest); size = tokens
    of the sequence. FLOPs are counted causally, backward as 2.5 times forward, as FlashAttention does.
    ``memory``: share of the memory bandwidth that norms, activations and permutations reach.
    """

    sources: tuple[str, ...] = ()
    gemm: Curve
    grouped_gemm: Curve
    attention: Annotated[dict[int, AttentionCurves], Field(min_length=1)]
    memory: Fraction

    def attention_curves(self, head_dim: int) -> AttentionCurves:
        """The curves for a head dimension."""
        reached = [size for size in self.attention if size <= head_dim]
        return self.attention[max(reached) if reached else min(self.attention)]


def _named(kind: Literal["gpus", "efficiency"]) -> BeforeValidator:
    """The record may be given by the name of a shipped file."""
    return BeforeValidator(lambda value: read_mapping(find_config(kind, value)) if isinstance(value, str) else value)


class Calibration(Strict):
    """What measured times are over those that peaks and curves give; ``disagmoe plan --profile`` fits them."""

    attention: Quantity = 1.0
    ffn: Quantity = 1.0
    backward: Quantity = 1.0


class Gpu(Strict):
    """One accelerator. ``reserved_memory_gb`` is kept for the context, communicators and fragmentation.

    ``dtype``: the number format that training uses here and that ``peak_tflops`` is for.
    """

    name: str = Field(min_length=1)
    sources: tuple[str, ...] = ()
    dtype: Literal["bf16", "fp32"] = "bf16"
    peak_tflops: Quantity
    memory_gb: Quantity
    reserved_memory_gb: QuantityOrZero
    memory_bandwidth_gb_per_s: Quantity
    stage_overhead_us: QuantityOrZero
    efficiency: Annotated[Efficiency, _named("efficiency")]
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.reserved_memory_gb >= self.memory_gb:
            raise ValueError(
                f"reserved_memory_gb {self.reserved_memory_gb} leaves nothing of memory_gb {self.memory_gb}"
            )
        return self

    @property
    def bytes_per_number(self) -> int:
        """Of weights, activations and what travels."""
        return {"bf16": 2, "fp32": 4}[self.dtype]

    @property
    def peak_flops(self) -> float:
        return self.peak_tflops * 1e12

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gb - self.reserved_memory_gb) * 1e9


class Pool(Strict):
    """Equal nodes. ``nics_gbit_per_s`` lists the NICs of one node, which may differ."""

    name: str = Field(min_length=1)
    num_nodes: Annotated[Count, Field(le=1_000_000)]
    gpus_per_node: Annotated[Count, Field(le=1024)]
    gpu: Annotated[Gpu, _named("gpus")]
    nvlink_gb_per_s: Quantity
    nvlink_efficiency: Fraction
    nics_gbit_per_s: Annotated[tuple[Quantity, ...], Field(max_length=64)]

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def nics_per_node(self) -> int:
        return len(self.nics_gbit_per_s)


class Network(Strict):
    """What joins the nodes.

    ``rail_optimised``: NIC j of every node hangs on leaf j, so that only traffic between different rails or leaves
    climbs to the spine; otherwise all NICs of a node share a leaf. ``nodes_per_leaf`` nodes share leaves (0: all do).
    ``oversubscription``: bandwidth below a leaf over bandwidth above it. ``cross_rail_forwarding``: a message takes
    NVLink to the GPU on the receiver's rail first (NCCL's PXN), so that it stays on one rail.
    ``shared_nics``: any GPU may use any NIC of its node; otherwise each uses its own equal share.
    ``calibration``: measured times of transfers over those that bandwidths give, latencies apart.
    """

    efficiency: Fraction
    latency_us: QuantityOrZero
    local_latency_us: QuantityOrZero
    rail_optimised: bool
    cross_rail_forwarding: bool = True
    nodes_per_leaf: CountOrZero = 0
    oversubscription: Annotated[Quantity, Field(ge=1)] = 1.0
    shared_nics: bool = True
    calibration: Quantity = 1.0


class Cluster(Strict):
    """Pools of nodes and what joins them.

    ``storage_gb_per_s``: what checkpoints are written and read at. ``step_overhead_s``: what a step takes beside its
    pipeline, gradient reduction and optimizer; ``disagmoe plan --profile`` measures it.
    """

    name: str = Field(min_length=1)
    sources: tuple[str, ...] = ()
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)]
    network: Network
    storage_gb_per_s: Quantity
    step_overhead_s: QuantityOrZero = 0.0

    @model_validator(mode="after")
    def _nodes_can_talk(self) -> Self:
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise ValueError(f"pools must have different names, got {names}")
        if self.num_gpus > MOST_GPUS:
            raise ValueError(f"pools: num_nodes x gpus_per_node make {self.num_gpus:,} GPUs; at most {MOST_GPUS:,}")
        if self.num_nodes > 1:
            for pool in self.pools:
                if not pool.nics_gbit_per_s:
                    raise ValueError(f"pools.{pool.name}.nics_gbit_per_s: several nodes need at least one NIC each")
        return self

    @property
    def num_nodes(self) -> int:
        return sum(pool.num_nodes for pool in self.pools)

    @property
    def num_gpus(self) -> int:
        return sum(pool.num_gpus for pool in self.pools)

    @property
    def num_nics(self) -> int:
        return sum(pool.num_nodes * pool.nics_per_node for pool in self.pools)
