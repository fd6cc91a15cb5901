"""One system on one job, for ``disagmoe simulate``: its step, and a trace of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.plan_file import PlanFile
from megatron_disagmoe.planner.rerank import Ranked, ranked_as_planned
from megatron_disagmoe.planner.verify import problem_of as problem_of_plan
from megatron_disagmoe.reproduction.systems.af_pipe import best_af, result_of
from megatron_disagmoe.reproduction.systems.catalogue import AF_PIPE, baseline
from megatron_disagmoe.reproduction.systems.choose import Task, best_candidate
from megatron_disagmoe.reproduction.systems.layer import Costs
from megatron_disagmoe.reproduction.systems.pipeline import Shape, chunk_sizes
from megatron_disagmoe.reproduction.systems.result import Result
from megatron_disagmoe.reproduction.systems.serial import Serial
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.simulate import simulate_orders, timeline


@dataclass(frozen=True)
class Slice:
    """One operation of a trace. Seconds."""

    process: str
    thread: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Simulated:
    """A result with what a trace is made from."""

    result: Result
    slices: list[Slice]


def simulate_baseline(name: str, task: Task) -> Simulated | None:
    """A baseline at its best; None where nothing fits."""
    system = baseline(name, task.constants)
    found = best_candidate(system, task)
    if found is None:
        return None
    result, candidate = found
    return Simulated(result, _slices_of(system, candidate.costs, candidate.shape))


def _slices_of(system: Serial, costs: Costs, shape: Shape) -> list[Slice]:
    program = system.program(costs, shape, chunk_sizes(costs, shape.chunks))
    times = program.run()
    found = []
    for name, stream, start, end in zip(program.name, program.stream, times.start, times.end, strict=True):
        if isinstance(stream, tuple):
            kind, rank = stream
            found.append(Slice(f"pipeline rank {rank}", str(kind), name, float(start), float(end)))
    return found


def simulate_af(task: Task) -> Simulated | None:
    """AF-pipe with everything the planner knows; None where nothing fits."""
    result = best_af(task)
    if result is None or result.ranked is None:
        return None
    return Simulated(result, _slices_of_schedule(result.ranked))


def simulate_plan(task: Task, plan: PlanFile) -> Simulated:
    """A plan as it stands, on the task's cluster.

    Raises:
        ValueError: it doesn't go with model, cluster or length.
    """
    if plan.batch.sequence_length != task.sequence:
        raise ValueError(f"--seq-length {task.sequence}: the plan is for {plan.batch.sequence_length}")
    problem = problem_of_plan(plan, task.model, task.cluster)
    evaluation = evaluate(problem, plan.allocation(pools=tuple(pool.name for pool in task.cluster.pools)))
    ranked = ranked_as_planned(evaluation, group_size=plan.schedule.group_size, max_live=plan.schedule.max_live)
    bound = evaluation.fill_bound + evaluation.synchronise_seconds
    batch = Task(task.model, task.cluster, task.sequence, plan.batch.global_batch_size, task.constants)
    return Simulated(result_of(batch, ranked, least_bound=bound), _slices_of_schedule(ranked))


def _slices_of_schedule(ranked: Ranked) -> list[Slice]:
    orders = Orders.of(ranked.schedule)
    drawn = timeline(ranked.schedule, simulate_orders(orders, ranked.evaluation.costs))
    found = []
    for thread, spans in (("compute", drawn.compute), ("send", drawn.transfers)):
        for group, each in spans.items():
            for span in each:
                action = span.action
                edge = f"{'d' if action.gradient else ''}{action.edge.value} " if action.edge is not None else ""
                name = f"{edge or action.kind.value + ' '}{action.layer} m{action.micro_batch}"
                found.append(Slice(str(group), thread, name, span.start, span.end))
    return found


def simulate(name: str, task: Task, *, plan: PlanFile | None = None) -> Simulated | None:
    """A system by name; None where nothing fits.

    Raises:
        ValueError: there is none of that name, or a plan is given for a baseline.
    """
    if name != AF_PIPE:
        if plan is not None:
            raise ValueError(f"--plan is for --system {AF_PIPE}, not for {name}")
        return simulate_baseline(name, task)
    return simulate_af(task) if plan is None else simulate_plan(task, plan)


def save_trace(slices: Iterable[Slice], path: Path) -> None:
    """Write the Chrome trace format; a process is a pipeline rank or group, times are microseconds."""
    processes: dict[str, int] = {}
    threads: dict[tuple[str, str], int] = {}
    events: list[dict[str, object]] = []
    for each in slices:
        if each.process not in processes:
            processes[each.process] = len(processes)
            about = {"name": each.process}
            events.append({"name": "process_name", "ph": "M", "pid": processes[each.process], "args": about})
        process, key = processes[each.process], (each.process, each.thread)
        if key not in threads:
            threads[key] = len(threads)
            about = {"name": each.thread}
            events.append({"name": "thread_name", "ph": "M", "pid": process, "tid": threads[key], "args": about})
        start, length = each.start * 1e6, (each.end - each.start) * 1e6
        events.append(
            {"name": each.name, "ph": "X", "pid": process, "tid": threads[key], "ts": start, "dur": length}
        )
    path.write_text(json.dumps({"traceEvents": events}) + "\n", encoding="utf-8")
