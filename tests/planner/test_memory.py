"""Bytes on a GPU: states, live activations, levers; figures by hand and live counts from real schedules."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest

from megatron_disagmoe.builders.interleaved import Shape, interleaved
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import NodeLayout
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.evaluation import Evaluation
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.states import attention_parameters, state_level, state_levels
from megatron_disagmoe.schedules.actions import Group, Side
from megatron_disagmoe.schedules.liveness import peak_live
from tests.planner.problems import allocation, problem


@pytest.mark.parametrize(
    ("total", "parts"),
    [
        (18, (2, 4, 4, 4, 4)),
        (16, (2, 4, 2, 4, 4)),
        (14, (2, 4, 2, 2, 4)),
        (12, (2, 4, 2, 2, 2)),
        (8, (2, 2, 2, 1, 1)),
    ],
)
def test_where_bytes_per_parameter_come_from(total: int, parts: tuple[int, ...]) -> None:
    level = state_level("bf16", total)
    assert (level.weight, level.gradient, level.master, level.first, level.second) == parts
    assert level.why
    assert ("--use-precision-aware-optimizer" in level.flags) == (total < 18)


def test_an_unknown_level_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="18, 16, 14, 12, 8"):
        state_level("bf16", 10)
    assert [level.total for level in state_levels("fp32")] == [16]


def test_expert_input_of_qwen3_at_full_speed_is_101_gb() -> None:
    """4K tokens, one sequence per attention GPU, M = N, G = 4p: 4L - 1 = 375 live micro-batch-layers of 268 MB each."""
    for p in (1, 2):
        a = allocation(attention_groups=p, ffn_groups=p, dispatch="per-expert", group_size=4 * p)
        e = evaluate(problem("qwen3-235b-a22b"), a)
        one = 4096 * 8 * 4096 * 2  # tokens x k rows of 4096 bf16 numbers; M = N: as many a rank as a rank sends
        assert e.attention_first.live == 4 * 94 - 1
        assert e.ffn.live == 4 * 94 - 3
        assert e.attention_first.live * one / 1e9 == pytest.approx(101, abs=0.5)
        inner = 3 * 1536 * 2  # gate and up projection, and their product
        pair = 8
        assert e.ffn.kept_per_live == 4096 * 8 * (4096 * 2 + inner + pair)


def test_parameters_of_the_fullest_gpu() -> None:
    e = evaluate(problem(), allocation())
    # Mixtral: 16 of 32 layers, one of 8 experts, 18 bytes (R = 1: nothing to share the optimizer's state with)
    expert = 3 * 4096 * 14336
    assert e.ffn.parameters_and_gradients == 16 * expert * 6
    assert e.ffn.optimizer == 16 * expert * 12
    attention = 4096 * (2 * 32 + 2 * 8) * 128
    layer = attention + 8 * 4096 + 2 * 4096  # router, two norms
    held = 16 * layer + 32000 * 4096  # L mod p = 0: group 0 holds embedding, final norm and output layer
    assert e.attention_first.parameters_and_gradients == (held + 32000 * 4096 + 4096) * 6
    assert e.attention_first.optimizer == (held + 32000 * 4096 + 4096) * 12 / 8  # shared by M = 8


def test_a_tail_elsewhere_holds_the_output_layer() -> None:
    e = evaluate(problem(), allocation(attention_groups=3, ffn_groups=3))
    layer = 4096 * (2 * 32 + 2 * 8) * 128 + 8 * 4096 + 2 * 4096
    assert e.attention_first.parameters_and_gradients == (11 * layer + 32000 * 4096) * 6
    assert e.attention_tail.parameters_and_gradients == (10 * layer + 32000 * 4096 + 4096) * 6  # 32 mod 3 = 2


def test_tied_embeddings_are_a_copy_on_another_group() -> None:
    parameters = attention_parameters(load_model("quickstart"))
    layer = 96 * (2 * 6 + 2 * 2) * 16 + 8 * 96 + 2 * 96
    assert parameters.of_groups(1, tensor_parallel=1).tolist() == [4 * layer + 384 * 96 + 96]
    assert parameters.of_groups(3, tensor_parallel=1).tolist() == [
        2 * layer + 384 * 96,
        layer + 384 * 96 + 96,  # the tail: 4 mod 3 = 1
        layer,
    ]


def test_tensor_parallelism_cuts_matrices_but_not_norms_and_router() -> None:
    whole = evaluate(problem(), allocation(attention_ranks=4))
    cut = evaluate(problem(), allocation(attention_ranks=4, tensor_parallel=2))
    uncut = 16 * (8 * 4096 + 2 * 4096) + 4096
    both = whole.attention_first.parameters_and_gradients / 6
    assert cut.attention_first.parameters_and_gradients / 6 == pytest.approx((both - uncut) / 2 + uncut)
    assert cut.attention_first.kept_per_live == pytest.approx(whole.attention_first.kept_per_live / 2)


def test_replicas_share_the_optimizers_state_of_experts() -> None:
    alone = evaluate(problem(), allocation())
    three = evaluate(problem(batch=1536), allocation(replicas=3))
    assert three.ffn.optimizer == alone.ffn.optimizer / 3
    plain = evaluate(problem(batch=1536, space=Space(distributed_optimizer=False)), allocation(replicas=3))
    assert plain.ffn.optimizer == alone.ffn.optimizer


def _kept(**changes: object) -> tuple[float, float]:
    e = evaluate(problem(), allocation(**changes))
    return e.attention_first.kept_per_live, e.ffn.kept_per_live


def test_what_each_lever_leaves_of_a_live_activation() -> None:
    tokens, rows, width = 4096, 4096 * 2, 2  # M = N: k = 2 rows a token
    a_none, f_none = _kept()
    h, q, kv = 4096, 32 * 128, 2 * 8 * 128
    # two norms' inputs and outputs, query key value, what attention makes, its log-sum-exps, router
    assert a_none == tokens * ((4 * h + q + kv + q) * width + 4 * 32 + 9 * 8)
    assert f_none == rows * ((h + 3 * 14336) * width + 8)
    a_selective, f_selective = _kept(recompute_attention=Recompute.SELECTIVE, recompute_ffn=Recompute.SELECTIVE)
    assert a_selective == a_none - tokens * 2 * h * width  # norms' outputs
    assert f_selective == f_none - rows * 14336 * width  # the activation's output
    a_full, f_full = _kept(recompute_attention=Recompute.FULL, recompute_ffn=Recompute.FULL)
    assert a_full == tokens * h * width
    assert f_full == rows * (h * width + 8)
    assert _kept(recompute_ffn=Recompute.FULL, redispatch=True)[1] == rows * 8  # probabilities and indices only


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize(
    ("p", "layers", "group"), [(1, 8, 4), (2, 8, 8), (2, 8, 6), (4, 32, 16), (3, 30, 12), (3, 32, 12)]
)
def test_live_counts_are_those_of_interleaved_orders(p: int, layers: int, group: int, n: int) -> None:
    orders = interleaved(Shape(p, group), num_layers=layers, num_micro_batches=n)
    live = peak_live(orders.schedule({}))
    planned = problem(batch=8 * n)
    planned = dataclasses.replace(planned, model=planned.model.model_copy(update={"num_layers": layers}))
    even = math.ceil(n / math.ceil(n / group))
    e = evaluate(planned, allocation(attention_groups=p, ffn_groups=p, group_size=even))
    assert (e.attention_first.live, e.ffn.live) == (live[Group(Side.A, 0)], live[Group(Side.F, 0)])
    assert e.attention_tail.live == live[Group(Side.A, layers % p)]


def test_no_more_is_live_than_there_is() -> None:
    e = evaluate(problem(batch=16), allocation(group_size=2))
    assert e.num_micro_batches == 2
    assert e.attention_first.live == 16 * 2


def test_everything_is_counted() -> None:
    e: Evaluation = evaluate(problem(), allocation(nodes=NodeLayout.PAIRED))
    for memory in (e.attention_first, e.attention_tail, e.ffn):
        parts = dataclasses.asdict(memory)
        counted = sum(parts[name] for name in parts if name not in ("kept_per_live", "live"))
        assert memory.total == pytest.approx(counted)
        assert min(parts.values()) >= 0
        usable = 76e9
        assert memory.with_live(memory.most_live(usable)).total <= 80e9
        assert memory.with_live(memory.most_live(usable) + 1).total > 80e9


def test_more_recomputation_keeps_less_and_takes_longer() -> None:
    levels = [evaluate(problem(), allocation(recompute_attention=r, recompute_ffn=r)) for r in Recompute]
    for less, more in pairwise(levels):
        assert more.attention_first.kept_per_live < less.attention_first.kept_per_live
        assert more.ffn.kept_per_live < less.ffn.kept_per_live
        assert more.step_seconds > less.step_seconds
