"""The paper's closed forms: solved two ways, and our cost model where it reduces to them."""

from __future__ import annotations

import random

import pytest

from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.paper_roofline import (
    Coefficients,
    Machine,
    attention_intensity,
    coefficients,
    ffn_intensity,
    seconds_of,
    solve_by_enumeration,
    solve_milp,
    split_of,
    utilisation,
)
from tests.planner.problems import allocation, ideal_cluster, problem


def test_the_integer_program_equals_enumeration() -> None:
    rng = random.Random(7)
    for _ in range(200):
        c = Coefficients(rng.uniform(0, 1e5), rng.uniform(1e6, 1e9), rng.uniform(1e6, 1e9), rng.uniform(1e2, 1e6))
        machine = Machine(rng.randint(2, 64), rng.randint(2, 32), 1e15, rng.choice([6e9, 5e10, 1e11]))
        sequence = rng.choice([1024, 4096, 32768])
        milp, tried = (solve(c, machine, sequence=sequence) for solve in (solve_milp, solve_by_enumeration))
        assert milp.seconds == pytest.approx(tried.seconds, rel=1e-6)
        assert milp.attention_gpus + milp.ffn_gpus <= machine.gpus
        assert milp.attention_nics + milp.ffn_nics <= machine.nics
        gpus, nics = (milp.attention_gpus, milp.ffn_gpus), (milp.attention_nics, milp.ffn_nics)
        assert milp.seconds == seconds_of(c, machine, sequence=sequence, gpus=gpus, nics=nics)
        assert 0 < utilisation(c, machine, milp, sequence=sequence) <= 1


def test_coefficients_of_qwen3() -> None:
    c = coefficients(load_model("qwen3-235b-a22b"))
    assert c.a1 == 64 * 256  # 64 heads, 128 + 128 numbers, 2 FLOPs, half of all pairs
    others = 2 * 4096 * 9216 + 2 * 8192 * 4096 + 2 * 4096 * 128  # qkv, output projection, router
    assert c.attention_flops(4096) == 4096 * (2 * 2048.5 * 64 * 256 + others)
    assert c.b == 8 * 3 * 2 * 4096 * 1536
    assert c.c == 8 * 4096 * 2


def test_the_papers_intensities_rank_qwen3_at_4k_the_other_way_round_than_its_measurement() -> None:
    model = load_model("qwen3-235b-a22b")
    assert attention_intensity(model, 4096) == (4096 * (2 + 2 / 16) + 4 * 4096) / 16  # 1568
    assert ffn_intensity(model) == 3 * 1536  # 4608; measured: attention 1.08, FFN 0.73 of its communication
    assert ffn_intensity(model) > attention_intensity(model, 4096)


@pytest.mark.parametrize("sequence", [4096, 32768])
def test_our_model_becomes_the_papers(sequence: int) -> None:
    model = load_model("qwen3-235b-a22b")
    c = coefficients(model)
    a = allocation(attention_groups=1, ffn_groups=1, attention_ranks=8, ffn_ranks=16, dispatch="per-expert")
    e = evaluate(problem("qwen3-235b-a22b", ideal_cluster(), sequence=sequence), a)
    # A micro-batch is one sequence on each of the 8 attention ranks.
    peak, nic = 989.4e12, 400e9 / 8
    assert e.costs.forward_times[2] == pytest.approx(8 * c.attention_flops(sequence) / (8 * peak), rel=1e-6)
    assert e.costs.forward_times[1] == pytest.approx(8 * c.ffn_flops(sequence) / (16 * peak), rel=1e-6)
    # N2M carries hidden states only; the 8 NICs of the attention side bind.
    assert e.links.n2m[0] == pytest.approx(8 * c.num_bytes(sequence) / (8 * nic))


def test_the_papers_split_of_a_cluster() -> None:
    """Mixtral at 4K: compute binds, so M : N = C_A : C_F, which makes 18.3 of 128: 18 or 19."""
    cluster, model = load_cluster("h800-16x8"), load_model("mixtral-8x7b")
    found, c = split_of(model, cluster, sequence=4096), coefficients(model)
    assert found is not None
    # 32 heads, 128 + 128 numbers; qkv, output projection and router; 2 experts of 3 matrices
    a = 4096 * (2 * 2048.5 * 32 * 256 + 2 * 4096 * 6144 + 2 * 4096 * 4096 + 2 * 4096 * 8)
    f = 4096 * 2 * 3 * 2 * 4096 * 14336
    assert (c.attention_flops(4096), c.ffn_flops(4096)) == (a, f)
    assert 18 < 128 * a / (a + f) < 19
    assert max(a / 19, f / 109) < max(a / 18, f / 110)
    assert (found.attention_gpus, found.ffn_gpus) == (19, 109)
    assert found.seconds == pytest.approx(max(a / 19, f / 109) / 989.4e12)
    assert split_of(model, load_cluster("laptop"), sequence=4096) is None  # no NICs


def test_two_sides_need_two_gpus() -> None:
    with pytest.raises(ValueError, match="at least 2 GPUs"):
        Machine(1, 8, 1e15, 1e10)
