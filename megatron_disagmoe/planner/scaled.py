"""A plan and its model made so small that a few processes of one machine can train them.

What makes a plan run as it does is kept: kinds of layers, uneven depth, schedule, dispatch mode, recomputation of
whole stages, dispatching again. Sizes shrink; tensor and context parallelism and selective recomputation, which this
version does not run, go; latent attention becomes multi-head attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_disagmoe.builders import NOMINAL_COSTS
from megatron_disagmoe.builders.placement import balanced_placement, to_text
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import IN_TURN, Allocation, Job, NodeLayout
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.model_spec import GroupedQueryAttention, ModelSpec
from megatron_disagmoe.planner.plan_file import PlanFile
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.rerank import ranked_as_planned
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.states import state_levels

#: Of the small model.
_HEADS, _HEAD_DIM, _LAYERS, _SEQUENCE = 4, 8, 4, 32
#: Most processes of a small plan.
_PROCESSES = 4


@dataclass(frozen=True)
class Rehearsal:
    """A small plan, the model it is for, how many processes it takes, and what is not as in the large plan."""

    plan: PlanFile
    model: ModelSpec
    world_size: int
    left_out: tuple[str, ...]


def small_model(model: ModelSpec) -> ModelSpec:
    """Few layers, narrow; the same kinds of layers and experts, grouped-query or multi-head attention."""
    attention = model.attention
    known = attention if isinstance(attention, GroupedQueryAttention) else None
    grouped = known is not None and known.num_query_groups < known.num_heads
    small: dict[str, Any] = {
        "kind": "gqa",
        "num_heads": _HEADS,
        "num_query_groups": 2 if grouped else _HEADS,
        "head_dim": _HEAD_DIM,
        "qk_norm": known is not None and known.qk_norm,
    }
    moe = model.moe
    experts = min(moe.num_experts, 8)
    return ModelSpec.model_validate(
        {
            "name": f"{model.name}, small",
            "num_layers": _LAYERS + bool(model.dense_layers),
            "hidden_size": _HEADS * _HEAD_DIM,
            "vocab_size": 256,
            "tied_embeddings": model.tied_embeddings,
            "gated": model.gated,
            "layer_norm": model.layer_norm,
            "dense_layers": (0,) if model.dense_layers else (),
            "dense_ffn_hidden_size": 64 if model.dense_layers else 0,
            "attention": small,
            "moe": {
                "num_experts": experts,
                "top_k": min(moe.top_k, 2),
                "ffn_hidden_size": 32,
                "shared_ffn_hidden_size": 32 if moe.shared_ffn_hidden_size else 0,
                "shared_gate": moe.shared_gate,
            },
        }
    )


def small_allocation(plan: PlanFile) -> Allocation:
    """At most two groups and two ranks of each kind, in one replica of four processes."""
    s, lever = plan.sizes, plan.levers
    ratio = Fraction(s.attention_groups, s.ffn_groups)
    a_groups, f_groups = (min(s.attention_groups, 2),) * 2 if ratio == 1 else ((2, 1) if ratio > 1 else (1, 2))
    f_ranks = min(s.ffn_ranks, 2) if a_groups + 2 * f_groups <= _PROCESSES else 1
    a_ranks = min(s.attention_ranks, 2) if 2 * a_groups + f_ranks * f_groups <= _PROCESSES else 1
    full = {"none": Recompute.NONE, "selective": Recompute.NONE, "full": Recompute.FULL}
    return Allocation(
        attention_groups=a_groups,
        ffn_groups=f_groups,
        attention_ranks=a_ranks,
        ffn_ranks=f_ranks,
        nodes=NodeLayout.SPREAD,
        schedule=plan.schedule.kind,
        recompute_attention=full[lever.recompute_attention],
        recompute_ffn=full[lever.recompute_ffn],
        redispatch=lever.redispatch,
        dispatch=lever.dispatch,
        place_layers=_place_layers(plan, a_groups, f_groups),
    )


def _place_layers(plan: PlanFile, attention_groups: int, ffn_groups: int) -> str:
    """Fewer layers beside the output layer, where the large plan has that."""
    if plan.flags.get("--af-place-layers", IN_TURN) == IN_TURN or attention_groups == 1:
        return IN_TURN
    long_tail = replace(NOMINAL_COSTS, tail=2.0)
    return to_text(balanced_placement(_LAYERS, attention_groups, ffn_groups, long_tail))


def rehearsal(plan: PlanFile, model: ModelSpec) -> Rehearsal:
    """The small plan; planned for as many processes of one machine as it takes."""
    allocation = small_allocation(plan)
    laptop = load_cluster("laptop")
    pool = laptop.pools[0].model_copy(update={"gpus_per_node": allocation.num_gpus})
    cluster = laptop.model_copy(update={"pools": (pool,)})
    batch = 8 * allocation.attention_ranks
    small = small_model(model)
    problem = Problem(
        model=small,
        cluster=cluster,
        job=Job(_SEQUENCE, batch),
        space=Space(distributed_optimizer=plan.levers.distributed_optimizer),
        state=state_levels("fp32")[0],
    )
    max_live = None
    if plan.schedule.max_live is not None:
        max_live = max(2 * _LAYERS // allocation.attention_groups + 2, 8)  # less than a schedule without a cap keeps
    ranked = ranked_as_planned(evaluate(problem, allocation), group_size=None, max_live=max_live)
    return Rehearsal(plan_of(ranked), small, allocation.num_gpus, tuple(_left_out(plan, model)))


def _left_out(plan: PlanFile, model: ModelSpec) -> Iterator[str]:
    if not isinstance(model.attention, GroupedQueryAttention):
        yield "latent attention, which Megatron has only with Transformer Engine: multi-head attention instead"
    cuts = (plan.sizes.tensor_parallel, plan.sizes.context_parallel, plan.sizes.expert_tensor_parallel)
    if max(cuts) > 1:
        yield "TP {}, CP {}, ETP {}".format(*cuts)
    if "selective" in (plan.levers.recompute_attention, plan.levers.recompute_ffn):
        yield "selective recomputation"
