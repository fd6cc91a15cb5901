"""Whether a plan holds for a model and a cluster: sizes, nodes, memory with the real schedule, and what it promises."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.evaluation import Evaluation
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.plan_file import PlanFile
from megatron_disagmoe.planner.plan_making import af_flags, megatron_flags
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.rerank import Ranked, ranked_as_planned
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.states import state_level
from megatron_disagmoe.schedules.verifier import verify as verify_schedule

#: How far a promised time or memory may be from what it comes to now (relative).
TOLERANCE = 1e-3


def verify_plan(plan: PlanFile, model: ModelSpec, cluster: Cluster) -> list[str]:
    """Everything wrong with ``plan``, each message naming the field; empty where it holds."""
    try:
        problem = problem_of(plan, model, cluster)
        evaluation = evaluate(problem, plan.allocation(pools=tuple(pool.name for pool in cluster.pools)))
    except ValueError as error:
        return [str(error)]
    errors = [*_sizes(plan, evaluation), *_names(plan, model, cluster)]
    if errors:
        return errors
    try:
        ranked = ranked_as_planned(evaluation, group_size=plan.schedule.group_size, max_live=plan.schedule.max_live)
    except ValueError as error:
        return [f"schedule: {error}"]
    report = verify_schedule(ranked.schedule, max_live=plan.schedule.max_live)
    if not report.ok:
        errors.append(f"schedule: not safe to run: {report.explain()}")
    return [*errors, *_memory(ranked), *_promises(plan, ranked), *_flags(plan, ranked)]


def problem_of(plan: PlanFile, model: ModelSpec, cluster: Cluster) -> Problem:
    """The problem that a plan answers.

    Raises:
        ValueError: it does not go with model and cluster.
    """
    names = [pool.name for pool in cluster.pools]
    for field, name in (("attention_pool", plan.machines.attention_pool), ("ffn_pool", plan.machines.ffn_pool)):
        if name not in names:
            raise ValueError(f"machines.{field} {name!r}: the cluster has {', '.join(names)}")
    a, f = names.index(plan.machines.attention_pool), names.index(plan.machines.ffn_pool)
    dtype = cluster.pools[a].gpu.dtype
    state = state_level(dtype, plan.levers.bytes_per_parameter)
    sizes = plan.sizes
    space = Space(
        tensor_parallel=(sizes.tensor_parallel,),
        context_parallel=(sizes.context_parallel,),
        expert_tensor_parallel=(sizes.expert_tensor_parallel,),
        distributed_optimizer=plan.levers.distributed_optimizer or bool(state.flags),
    )
    return Problem(model, cluster, plan.job(), space, state, a, f)


def _names(plan: PlanFile, model: ModelSpec, cluster: Cluster) -> Iterator[str]:
    if plan.model != model.name:
        yield f"model: the plan is for {plan.model!r}, --model is {model.name!r}"
    if plan.cluster != cluster.name:
        yield f"cluster: the plan is for {plan.cluster!r}, --cluster is {cluster.name!r}"


def _sizes(plan: PlanFile, evaluation: Evaluation) -> Iterator[str]:
    a, job, problem = evaluation.allocation, plan.job(), evaluation.problem
    if a.num_gpus != plan.sizes.gpus:
        yield f"sizes.gpus {plan.sizes.gpus}: the groups add up to {a.num_gpus}"
    if a.num_gpus > problem.max_gpus:
        yield f"sizes.gpus {a.num_gpus}: the cluster has {problem.max_gpus}"
    per_micro_batch = job.micro_batch_size * a.attention_ranks * a.replicas
    if job.global_batch_size % per_micro_batch:
        yield (
            f"batch.global_batch_size {job.global_batch_size} is no multiple of {per_micro_batch} = micro-batch "
            f"{job.micro_batch_size} x {a.attention_ranks} attention ranks x {a.replicas} replicas"
        )
    elif evaluation.num_micro_batches != plan.batch.micro_batches:
        yield f"batch.micro_batches {plan.batch.micro_batches}: the sizes give {evaluation.num_micro_batches}"
    if not evaluation.geometry.fits[0]:
        yield f"machines.layout {plan.machines.layout!r}: these groups do not fit the cluster's nodes that way"
    if a.dispatch == "per-node" and not evaluation.geometry.ffn_nodes[0]:
        yield "levers.dispatch 'per-node': an FFN group has different numbers of ranks on its nodes"
    levers = plan.levers
    if levers.redispatch and levers.recompute_ffn != "full":
        yield f"levers.redispatch needs recompute_ffn 'full', got {levers.recompute_ffn!r}"


def _memory(ranked: Ranked) -> Iterator[str]:
    problem = ranked.evaluation.problem
    for side, memory, gpu in (
        ("attention", ranked.attention, problem.attention_pool.gpu),
        ("ffn", ranked.ffn, problem.ffn_pool.gpu),
    ):
        if memory.total > gpu.memory_gb * 1e9:
            yield (
                f"memory_gb.{side}: needs {memory.total / 1e9:.1f} GB with {memory.live} live activations, "
                f"a {gpu.name} has {gpu.memory_gb:g}"
            )


def _promises(plan: PlanFile, ranked: Ranked) -> Iterator[str]:
    expected, schedule, memory = plan.expected, plan.schedule, plan.memory_gb
    for field, promised, found in (
        ("expected.step_time_s", expected.step_time_s, ranked.step_seconds),
        ("expected.fill_bound_s", expected.fill_bound_s, ranked.evaluation.fill_bound),
        ("memory_gb.attention.total", memory.attention.total, ranked.attention.total / 1e9),
        ("memory_gb.ffn.total", memory.ffn.total, ranked.ffn.total / 1e9),
        ("schedule.peak_live_attention", schedule.peak_live_attention, ranked.attention.live),
        ("schedule.peak_live_ffn", schedule.peak_live_ffn, ranked.ffn.live),
    ):
        if abs(promised - found) > TOLERANCE * found + 2e-3 * field.startswith("memory"):
            yield f"{field} {promised:g}: this model and cluster give {found:g}"


def _flags(plan: PlanFile, ranked: Ranked) -> Iterator[str]:
    ours = af_flags(ranked)
    for flag in sorted({*ours, *plan.flags}):
        if plan.flags.get(flag) != ours.get(flag):
            yield f"flags.{flag} {plan.flags.get(flag)!r}: the plan's sizes and levers say {ours.get(flag)!r}"
    expected = megatron_flags(ranked.evaluation)
    if plan.megatron_flags != expected:
        yield f"megatron_flags: the plan's sizes and levers say {' '.join(expected)}"
