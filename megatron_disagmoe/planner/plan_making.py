"""From a ranked allocation to its plan file."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence

from megatron_disagmoe.arguments.refusals import refused
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import IN_TURN, Allocation
from megatron_disagmoe.planner.evaluation import Evaluation, GroupMemory
from megatron_disagmoe.planner.hosts import seats
from megatron_disagmoe.planner.model_import import parse_flags
from megatron_disagmoe.planner.plan_file import (
    Batch,
    Costs,
    Expected,
    Host,
    Levers,
    Machines,
    MemoryOfSides,
    MemoryRecord,
    PlanFile,
    RecomputeName,
    ScheduleChoiceRecord,
    Sizes,
    StageTimes,
    ranges_of,
)
from megatron_disagmoe.planner.rerank import Ranked

_NAMES: dict[Recompute, RecomputeName] = {
    Recompute.NONE: "none",
    Recompute.SELECTIVE: "selective",
    Recompute.FULL: "full",
}


def plan_of(ranked: Ranked, *, reasons: Sequence[str] = ()) -> PlanFile:
    """The plan file of an allocation and its schedule."""
    evaluation = ranked.evaluation
    problem, a = evaluation.problem, evaluation.allocation
    job, cluster = problem.job, problem.cluster
    megatron = megatron_flags(evaluation)
    missing = missing_features(a, megatron)
    layout = [
        Host(node=node, ranks=ranges_of(ranks), roles=roles)
        for node, ranks, roles in _hosts(a, evaluation)
    ]
    return PlanFile(
        model=problem.model.name,
        cluster=cluster.name,
        batch=Batch(
            sequence_length=job.sequence_length,
            global_batch_size=job.global_batch_size,
            micro_batch_size=job.micro_batch_size,
            micro_batches=evaluation.num_micro_batches,
            imbalance=job.imbalance,
        ),
        sizes=Sizes(**a.sizes, gpus=a.num_gpus),
        machines=_machines(evaluation, num_nodes=len(layout)),
        levers=Levers(
            dispatch=a.dispatch,
            recompute_attention=_NAMES[a.recompute_attention],
            recompute_ffn=_NAMES[a.recompute_ffn],
            redispatch=a.redispatch,
            distributed_optimizer=uses_distributed_optimizer(evaluation),
            bytes_per_parameter=problem.state.total,
        ),
        schedule=ScheduleChoiceRecord(
            kind=a.schedule,
            group_size=ranked.group_size,
            max_live=ranked.max_live,
            peak_live_attention=ranked.attention.live,
            peak_live_ffn=ranked.ffn.live,
        ),
        expected=Expected(
            step_time_s=ranked.step_seconds,
            pipeline_s=ranked.pipeline_seconds,
            synchronise_s=evaluation.synchronise_seconds,
            fill_bound_s=evaluation.fill_bound,
            tokens_per_second=job.tokens_per_step / ranked.step_seconds,
            mfu=evaluation.mfu_at(ranked.step_seconds),
        ),
        memory_gb=MemoryOfSides(
            attention=_memory(ranked.attention, problem.attention_pool.gpu.memory_gb),
            ffn=_memory(ranked.ffn, problem.ffn_pool.gpu.memory_gb),
        ),
        flags=af_flags(ranked),
        megatron_flags=megatron,
        runs_here=not missing,
        missing=missing,
        reasons=tuple(reasons),
        costs=_costs(evaluation),
        hosts=tuple(layout),
    )


def uses_distributed_optimizer(evaluation: Evaluation) -> bool:
    """Whether the optimizer's state is shared out: wherever parameters have copies, or lower precision asks for it."""
    a, problem = evaluation.allocation, evaluation.problem
    copies = a.attention_ranks * a.replicas * a.context_parallel
    return problem.space.distributed_optimizer and (copies > 1 or bool(problem.state.flags))


def af_flags(ranked: Ranked) -> dict[str, int | str | bool]:
    """Our flags."""
    a = ranked.evaluation.allocation
    flags: dict[str, int | str | bool] = {
        "--af-attention-groups": a.attention_groups,
        "--af-ffn-groups": a.ffn_groups,
        "--af-attention-ranks": a.attention_ranks,
        "--af-ffn-ranks": a.ffn_ranks,
        "--af-schedule": a.schedule,
        "--af-dispatch": a.dispatch,
    }
    if a.place_layers != IN_TURN:
        flags["--af-place-layers"] = a.place_layers
    if ranked.group_size is not None:
        flags["--af-micro-batch-group-size"] = ranked.group_size
    if ranked.max_live is not None:
        flags["--af-max-live-micro-batches"] = ranked.max_live
    ffn_nodes = int(ranked.evaluation.geometry.ffn_nodes[0])
    if a.dispatch == "per-node" and ffn_nodes:
        flags["--af-ranks-per-node"] = a.ffn_ranks // ffn_nodes
    both = (a.recompute_attention is Recompute.FULL, a.recompute_ffn is Recompute.FULL)
    if any(both):
        flags["--af-recompute"] = {(True, False): "attention", (False, True): "ffn", (True, True): "both"}[both]
    if a.redispatch:
        flags["--af-redispatch"] = True
    return flags


def megatron_flags(evaluation: Evaluation) -> tuple[str, ...]:
    """Megatron's flags that belong to the plan."""
    problem, a = evaluation.problem, evaluation.allocation
    job = problem.job
    words = [
        *("--seq-length", str(job.sequence_length)),
        *("--micro-batch-size", str(job.micro_batch_size)),
        *("--global-batch-size", str(job.global_batch_size)),
    ]
    for flag, size in (
        ("--tensor-model-parallel-size", a.tensor_parallel),
        ("--context-parallel-size", a.context_parallel),
        ("--expert-tensor-parallel-size", a.expert_tensor_parallel),
    ):
        words += [flag, str(size)] if size > 1 else []
    words += ["--sequence-parallel"] if a.tensor_parallel > 1 else []
    if uses_distributed_optimizer(evaluation):
        words += ["--use-distributed-optimizer"]
        words += problem.state.flags
    words += ["--bf16"] if problem.attention_pool.gpu.dtype == "bf16" else []
    if Recompute.SELECTIVE in (a.recompute_attention, a.recompute_ffn):
        modules = {"layernorm": a.recompute_attention, "moe_act": a.recompute_ffn}
        chosen = [name for name, level in modules.items() if level is Recompute.SELECTIVE]
        words += ["--recompute-granularity", "selective", "--recompute-modules", *chosen]
    return tuple(words)


def missing_features(allocation: Allocation, megatron: Sequence[str]) -> tuple[str, ...]:
    """What this version refuses of a plan, in its own words."""
    values = {name: int(value) if str(value).isdigit() else value for name, value in parse_flags(megatron).items()}
    return tuple(dict.fromkeys(refused(Namespace(**values))))


def _machines(evaluation: Evaluation, *, num_nodes: int) -> Machines:
    a, geometry, pools = evaluation.allocation, evaluation.geometry, evaluation.problem.cluster.pools
    a_nodes, f_nodes = int(geometry.attention_nodes[0]), int(geometry.ffn_nodes_in_all[0])
    return Machines(
        attention_pool=pools[a.attention_pool].name,
        ffn_pool=pools[a.ffn_pool].name,
        layout=a.nodes.value,
        nic_split=a.nic_split,
        attention_nics=a.attention_nics_per_node * a_nodes,
        ffn_nics=a.ffn_nics_per_node * f_nodes,
        nodes=num_nodes,
    )


def _memory(memory: GroupMemory, capacity: float) -> MemoryRecord:
    def gb(value: float) -> float:
        return round(value / 1e9, 3)

    return MemoryRecord(
        parameters_and_gradients=gb(memory.parameters_and_gradients),
        optimizer=gb(memory.optimizer),
        activations=gb(memory.activations),
        workspace=gb(memory.workspace),
        transport=gb(memory.transport),
        reserved=gb(memory.reserved),
        total=gb(memory.total),
        capacity=capacity,
    )


def _costs(evaluation: Evaluation) -> Costs:
    """Attention stages that take equally long together, each kind once."""
    costs = evaluation.costs
    again = evaluation.again_times
    kinds: dict[tuple[float, float, float, float], list[int]] = {}
    for number in range(0, len(costs.forward_times), 2):
        times = (costs.forward_times[number], costs.backward_times[number], costs.weight_times[number], again[number])
        kinds.setdefault(times, []).append(number // 2)

    def record(times: tuple[float, float, float, float], stages: str) -> StageTimes:
        forward, backward, weight, repeated = times
        return StageTimes(stages=stages, forward=forward, backward=backward, weight=weight, again=repeated)

    ffn = (costs.forward_times[1], costs.backward_times[1], costs.weight_times[1], again[1])
    layers = evaluation.problem.num_layers
    return Costs(
        attention=tuple(record(times, ranges_of(stages)) for times, stages in kinds.items()),
        ffn=record(ffn, f"0-{layers - 1}" if layers > 1 else "0"),
        m2n=costs.transfer,
        n2m=costs.transfer if costs.combine is None else costs.combine,
        lane=costs.lane,
    )


def _hosts(allocation: Allocation, evaluation: Evaluation) -> Iterable[tuple[int, list[int], str]]:
    """Every node with its ranks and, in short, what they are."""
    nodes: dict[int, list[tuple[int, str]]] = {}
    for seat in seats(allocation, evaluation.problem.cluster, num_layers=evaluation.problem.num_layers):
        nodes.setdefault(seat.node, []).append((seat.rank, f"{seat.group} r{seat.replica}"))
    for node in sorted(nodes):
        counted: dict[str, int] = {}
        for _, role in nodes[node]:
            counted[role] = counted.get(role, 0) + 1
        roles = ", ".join(f"{count} x {role}" for role, count in counted.items())
        yield node, [rank for rank, _ in nodes[node]], roles
