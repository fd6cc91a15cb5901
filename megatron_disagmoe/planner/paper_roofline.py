"""The closed forms of DisagMoE (arXiv 2605.11005), kept beside our cost model as its special case.

With M attention and N FFN GPUs, M_A and M_F of the NICs, peak FLOPs P of a GPU and bandwidth B of a NIC, one layer at
sequence length s takes

    T_A = max(C_A / (M P), V / (M_A B))      C_A = a1 s^2 + a2 s
    T_F = max(C_F / (N P), V / (M_F B))      C_F = b s,  V = c s

and the paper chooses M + N = W and M_A + M_F = all NICs for the least max(T_A, T_F), as an integer program; ties by
utilisation (C_A + C_F) / (T W P). It is what our model becomes where every operation runs at peak, one layer and
sequence is all there is, nothing has latency, nothing stays inside a node, and pipeline, memory and levers are left
out (``tests/planner/test_paper.py`` holds the two together). It knows no efficiencies; on Qwen3 at 4K it therefore
ranks the two sides the other way round from the paper's own measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.operations import (
    Does,
    attention_operations,
    expert_operations,
    moe_dense_operations,
    num_flops,
)
from megatron_disagmoe.planner.traffic import node_nic_rate


@dataclass(frozen=True)
class Coefficients:
    """Forward FLOPs and bytes of one MoE layer: C_A = ``a1`` s^2 + ``a2`` s, C_F = ``b`` s, V = ``c`` s."""

    a1: float
    a2: float
    b: float
    c: float

    def attention_flops(self, sequence: int) -> float:
        return self.a1 * sequence**2 + self.a2 * sequence

    def ffn_flops(self, sequence: int) -> float:
        return self.b * sequence

    def num_bytes(self, sequence: int) -> float:
        return self.c * sequence


def coefficients(model: ModelSpec, *, bytes_per_number: int = 2) -> Coefficients:
    """Of a model's last MoE layer, one copy of a token per expert; causal attention over the whole sequence."""
    layer = model.moe_layers[-1]
    operations = attention_operations(model, layer=layer, sequence=1)
    others = sum(each.amount for each in operations if each.does is Does.GEMM)
    attention = model.attention
    per_pair = attention.num_heads * (attention.key_dim + attention.value_dim)  # (s + 1) / 2 pairs a token, 2 FLOPs
    return Coefficients(
        a1=per_pair,
        a2=per_pair + others + num_flops(moe_dense_operations(model)),
        b=model.moe.top_k * num_flops(expert_operations(model)),
        c=model.moe.top_k * model.hidden_size * bytes_per_number,
    )


def attention_intensity(model: ModelSpec, sequence: int) -> float:
    """The paper's I_attn = (H (2 + 2/g) + 4 s) / (2 k), H the hidden size, g query heads per key/value head.

    It counts projections in multiply-adds and attention in FLOPs, and takes heads x head dimension for H.
    """
    shared = model.attention.num_heads / model.attention.num_query_groups
    return (model.hidden_size * (2 + 2 / shared) + 4 * sequence) / (2 * model.moe.top_k)


def ffn_intensity(model: ModelSpec) -> float:
    """The paper's I_ffn = 2 De for an expert of two matrices; 3 De with a gate."""
    return model.matrices_per_mlp * model.moe.ffn_hidden_size


@dataclass(frozen=True)
class Split:
    """GPUs and NICs of the two sides and the seconds of a layer, max(T_A, T_F)."""

    attention_gpus: int
    ffn_gpus: int
    attention_nics: int
    ffn_nics: int
    seconds: float


@dataclass(frozen=True)
class Machine:
    """W GPUs of ``flops`` each and NICs of ``nic_bytes_per_s`` each."""

    gpus: int
    nics: int
    flops: float
    nic_bytes_per_s: float

    def __post_init__(self) -> None:
        if self.gpus < 2 or self.nics < 2:
            raise ValueError(f"two sides need at least 2 GPUs and 2 NICs, got {self.gpus} and {self.nics}")


def solve_milp(c: Coefficients, machine: Machine, *, sequence: int) -> Split:
    """The paper's integer program: maximise the rate r = 1 / T, in which every constraint is linear.

    r C_A <= M P, r V <= M_A B, r C_F <= N P, r V <= M_F B. HiGHS, through SciPy.

    Raises:
        RuntimeError: the solver gave up.
    """
    p, b = machine.flops, machine.nic_bytes_per_s
    attention, ffn, volume = c.attention_flops(sequence), c.ffn_flops(sequence), c.num_bytes(sequence)
    # The unit of r is what all GPUs could do together, so that the matrix is well scaled.
    unit = (attention + ffn) / (machine.gpus * p)
    rows = np.array(
        [
            [attention / unit, -p, 0, 0, 0],
            [ffn / unit, 0, -p, 0, 0],
            [volume / unit, 0, 0, -b, 0],
            [volume / unit, 0, 0, 0, -b],
        ]
    )
    rows /= np.abs(rows).max(axis=1, keepdims=True)
    totals = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]])
    result = milp(
        c=[-1, 0, 0, 0, 0],
        constraints=[
            LinearConstraint(rows, -np.inf, 0),
            LinearConstraint(totals, -np.inf, [machine.gpus, machine.nics]),
        ],
        integrality=[0, 1, 1, 1, 1],
        bounds=Bounds([0, 1, 1, 1, 1], [np.inf, machine.gpus, machine.gpus, machine.nics, machine.nics]),
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise RuntimeError(f"HiGHS found no split of {machine.gpus} GPUs and {machine.nics} NICs: {result.message}")
    m, n, m_a, m_f = (round(value) for value in result.x[1:])
    return Split(m, n, m_a, m_f, seconds_of(c, machine, sequence=sequence, gpus=(m, n), nics=(m_a, m_f)))


def seconds_of(
    c: Coefficients, machine: Machine, *, sequence: int, gpus: tuple[int, int], nics: tuple[int, int]
) -> float:
    """max(T_A, T_F) of a split."""
    p, b, volume = machine.flops, machine.nic_bytes_per_s, c.num_bytes(sequence)
    attention = max(c.attention_flops(sequence) / (gpus[0] * p), volume / (nics[0] * b))
    return max(attention, c.ffn_flops(sequence) / (gpus[1] * p), volume / (nics[1] * b))


def solve_by_enumeration(c: Coefficients, machine: Machine, *, sequence: int) -> Split:
    """The same by trying every split of GPUs and every split of NICs."""
    m = np.arange(1, machine.gpus)[:, None]
    m_a = np.arange(1, machine.nics)[None, :]
    volume = c.num_bytes(sequence) / machine.nic_bytes_per_s
    compute = np.maximum(c.attention_flops(sequence) / m, c.ffn_flops(sequence) / (machine.gpus - m)) / machine.flops
    seconds = np.maximum(compute, np.maximum(volume / m_a, volume / (machine.nics - m_a)))
    at_m, at_nic = np.unravel_index(int(seconds.argmin()), seconds.shape)
    gpus, nics = int(m[at_m, 0]), int(m_a[0, at_nic])
    return Split(gpus, machine.gpus - gpus, nics, machine.nics - nics, float(seconds[at_m, at_nic]))


def utilisation(c: Coefficients, machine: Machine, split: Split, *, sequence: int) -> float:
    """(C_A + C_F) / (T W P) over the GPUs that the split uses."""
    used = split.attention_gpus + split.ffn_gpus
    return (c.attention_flops(sequence) + c.ffn_flops(sequence)) / (split.seconds * used * machine.flops)


def split_of(model: ModelSpec, cluster: Cluster, *, sequence: int) -> Split | None:
    """The paper's split of a whole cluster; None where it has not got one kind of GPU, or no two NICs."""
    if len(cluster.pools) > 1 or cluster.num_nics < 2:
        return None
    pool = cluster.pools[0]
    nic = node_nic_rate(pool, cluster.network) / pool.nics_per_node
    machine = Machine(cluster.num_gpus, cluster.num_nics, pool.gpu.peak_flops, nic)
    c = coefficients(model, bytes_per_number=pool.gpu.bytes_per_number)
    return solve_milp(c, machine, sequence=sequence)
