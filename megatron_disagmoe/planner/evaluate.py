"""One allocation in full, whether its layers lie in turn or otherwise; allocations as entries of candidates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import DISPATCH_MODES, IN_TURN, SCHEDULE_KINDS, Allocation, NodeLayout
from megatron_disagmoe.planner.evaluation import Evaluation, GroupMemory
from megatron_disagmoe.planner.links import geometry_of, links_of
from megatron_disagmoe.planner.live import live_counts
from megatron_disagmoe.planner.memory import Memory, SideMemory, memory_of, num_micro_batches
from megatron_disagmoe.planner.objective import fill_bound, pipeline_seconds, stages_of
from megatron_disagmoe.planner.placed import evaluate_placed
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import FFN_LEVERS, LAYOUTS, Candidates
from megatron_disagmoe.planner.synchronise import synchronise_seconds


def allocation_of(problem: Problem, candidates: Candidates, at: int) -> Allocation:
    """One candidate as an allocation."""
    c = candidates
    layout = LAYOUTS[int(c.layout[at])]
    a_pool, f_pool = problem.attention_pool, problem.ffn_pool
    a_nics, f_nics = float(a_pool.nics_per_node), float(f_pool.nics_per_node)
    tp, cp = problem.attention.cuts[int(c.cut[at])]
    recompute_ffn, redispatch = FFN_LEVERS[int(c.ffn_lever[at])]
    allocation = Allocation(
        attention_groups=int(c.attention_groups[at]),
        ffn_groups=int(c.ffn_groups[at]),
        attention_ranks=int(c.attention_ranks[at]),
        ffn_ranks=int(c.ffn_ranks[at]),
        replicas=int(c.replicas[at]),
        tensor_parallel=tp,
        context_parallel=cp,
        expert_tensor_parallel=int(c.expert_tensor_parallel[at]),
        attention_pool=problem.attention_pool_index,
        ffn_pool=problem.ffn_pool_index,
        nodes=layout,
        nic_split=int(c.nics[at]),
        schedule=SCHEDULE_KINDS[int(c.kind[at])],
        group_size=int(c.group_size[at]),
        recompute_attention=Recompute(int(c.recompute[at])),
        recompute_ffn=recompute_ffn,
        redispatch=redispatch,
        dispatch=DISPATCH_MODES[int(c.dispatch[at])],
        attention_nics_per_node=a_nics,
        ffn_nics_per_node=f_nics,
    )
    if layout is NodeLayout.SEPARATE or not a_pool.nics_per_node:
        return allocation
    split = problem.nics[allocation.nic_split]
    if split.attention:
        return replace(allocation, attention_nics_per_node=split.attention, ffn_nics_per_node=split.ffn)
    share = allocation.attention_gpus / allocation.num_gpus
    return replace(allocation, attention_nics_per_node=a_nics * share, ffn_nics_per_node=a_nics * (1 - share))


def candidate_of(problem: Problem, allocation: Allocation) -> Candidates:
    """An allocation as the one entry of candidates.

    Raises:
        ValueError: it uses what the problem's tables do not hold.
    """
    a = allocation
    cut = (a.tensor_parallel, a.context_parallel)
    for name, value, known in (
        ("tensor_parallel, context_parallel", cut, problem.attention.cuts),
        ("attention_ranks", a.attention_ranks, problem.ffn.attention_ranks.tolist()),
        ("ffn_ranks", a.ffn_ranks, problem.ffn.ffn_ranks.tolist()),
        ("expert_tensor_parallel", a.expert_tensor_parallel, problem.ffn.cuts.tolist()),
        ("nic_split", a.nic_split, range(len(problem.nics))),
    ):
        if value not in known:
            raise ValueError(f"{name} {value} is not possible here: choose from {list(known)}")
    for name, groups in (("attention_groups", a.attention_groups), ("ffn_groups", a.ffn_groups)):
        if not 1 <= groups <= problem.max_groups:
            raise ValueError(f"{name} {groups} is not possible here: choose between 1 and {problem.max_groups}")
    columns = (
        a.attention_groups,
        a.ffn_groups,
        a.attention_ranks,
        a.ffn_ranks,
        a.replicas,
        problem.attention.cuts.index(cut),
        a.expert_tensor_parallel,
        LAYOUTS.index(a.nodes),
        DISPATCH_MODES.index(a.dispatch),
        a.nic_split,
        int(a.recompute_attention),
        FFN_LEVERS.index((a.recompute_ffn, a.redispatch)),
        SCHEDULE_KINDS.index(a.schedule),
        a.group_size,
    )
    return Candidates(*(np.array([column], np.int64) for column in columns))


def evaluate(problem: Problem, allocation: Allocation) -> Evaluation:
    """Everything about ``allocation``, whether it fits or not.

    Raises:
        ValueError: sizes that the model, the batch or the cluster do not allow.
    """
    candidate = candidate_of(problem, allocation)
    geometry = geometry_of(problem, candidate, allocation.nodes)
    links = links_of(problem, candidate, geometry)
    stages = stages_of(problem, candidate, links)
    memory = memory_of(problem, candidate, links)
    n = num_micro_batches(problem, candidate)
    live = live_counts(problem, candidate)

    def counted(kind: str) -> int:
        if allocation.schedule == "sequential":
            groups = allocation.ffn_groups if kind == "ffn" else allocation.attention_groups
            return -(-problem.num_layers // groups)
        return int(getattr(live, kind).count(candidate.group_size, n)[0])

    evaluation = Evaluation(
        problem=problem,
        allocation=allocation,
        geometry=geometry,
        links=links,
        stages=stages,
        candidate=candidate,
        pipeline_seconds=float(pipeline_seconds(problem, candidate, links, stages)[0]),
        fill_bound=float(fill_bound(problem, candidate, links, stages)[0]),
        synchronise_seconds=float(synchronise_seconds(problem, candidate, links)[0]),
        attention_first=_group_memory(problem, memory, "first", counted("first")),
        attention_tail=_group_memory(problem, memory, "tail", counted("tail")),
        ffn=_group_memory(problem, memory, "ffn", counted("ffn")),
    )
    if allocation.place_layers == IN_TURN:
        return evaluation
    in_turn = replace(evaluation, allocation=replace(allocation, place_layers=IN_TURN))
    return evaluate_placed(in_turn, allocation)


def _group_memory(problem: Problem, memory: Memory, kind: str, live: int) -> GroupMemory:
    side: SideMemory = getattr(memory, kind)
    gpu = problem.ffn_pool.gpu if kind == "ffn" else problem.attention_pool.gpu
    kept = float(side.kept[0])
    return GroupMemory(
        parameters_and_gradients=float(side.fixed.parameters[0]),
        optimizer=float(side.fixed.optimizer[0]),
        activations=live * kept,
        workspace=float(side.fixed.workspace[0]),
        transport=float(side.fixed.transport[0]),
        reserved=gpu.reserved_memory_gb * 1e9,
        kept_per_live=kept,
        live=live,
    )
