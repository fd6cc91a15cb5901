"""What ``disagmoe plan`` tells people: tables on a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_disagmoe.planner.allocation import IN_TURN
from megatron_disagmoe.planner.drift import Drift, Mixed
from megatron_disagmoe.planner.explain import uses
from megatron_disagmoe.planner.paper_roofline import Split
from megatron_disagmoe.planner.plan_file import MemoryRecord, PlanFile
from megatron_disagmoe.planner.planning import Outcome, Request
from megatron_disagmoe.planner.rerank import Ranked
from megatron_disagmoe.planner.sensitivity import Diagnosis, Variation


def render_plan(
    console: Console, outcome: Outcome, plan: PlanFile, varied: Sequence[Variation], paper: Split | None
) -> None:
    """Everything about the plan: what it is, what binds, memory, why, next best, sensitivity."""
    _sizes(console, plan)
    console.print(_uses(outcome.ranked[0]))
    console.print(_memory(plan))
    for reason in plan.reasons:
        console.print(f"- {reason}", highlight=False, markup=False, soft_wrap=True)
    console.print(_alternatives(outcome))
    if varied:
        console.print(_sensitivity(varied, outcome.analytic_seconds))
    if paper is not None:
        console.print(
            f"the paper's closed forms (peak speed, one copy an expert, no memory, no latency) give attention "
            f"{paper.attention_gpus} GPUs and {paper.attention_nics} NICs, FFN {paper.ffn_gpus} and {paper.ffn_nics}",
            highlight=False,
            soft_wrap=True,
        )
    for line in plan.missing:
        console.print(f"this version cannot run it yet: {line}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"{outcome.num_scored:,} candidates scored in {outcome.solve_seconds:.2f} s; "
        f"the best ranked again by simulation in {outcome.rerank_seconds:.1f} s",
        highlight=False,
    )


def _sizes(console: Console, plan: PlanFile) -> None:
    table = Table(
        title=f"{plan.model} on {plan.cluster}, {plan.batch.sequence_length} tokens", box=None, show_header=False
    )
    for name, text in _lines(plan):
        table.add_row(name, text)
    console.print(table)


def _lines(plan: PlanFile) -> Iterator[tuple[str, str]]:
    s, m, lever, e, schedule = plan.sizes, plan.machines, plan.levers, plan.expected, plan.schedule
    bound = e.fill_bound_s + e.synchronise_s
    speed = f"{e.tokens_per_second:,.0f} tokens/s, {e.mfu:.1%} MFU"
    yield "step", f"{e.step_time_s:.4g} s (lower bound {bound:.4g}), {speed}"
    cut = f" x TP {s.tensor_parallel} x CP {s.context_parallel}" if s.tensor_parallel * s.context_parallel > 1 else ""
    groups, ranks = _counted(s.attention_groups, "group"), _counted(s.attention_ranks, "rank")
    yield "attention", f"{groups} x {ranks}{cut}, {m.attention_nics:g} NICs{_on(m.attention_pool, m.ffn_pool)}"
    etp = f" x ETP {s.expert_tensor_parallel}" if s.expert_tensor_parallel > 1 else ""
    groups, ranks = _counted(s.ffn_groups, "group"), _counted(s.ffn_ranks, "rank")
    yield "FFN", f"{groups} x {ranks}{etp}, {m.ffn_nics:g} NICs{_on(m.ffn_pool, m.attention_pool)}"
    yield "GPUs", f"{s.gpus} on {_counted(m.nodes, 'node')} ({m.layout}), {_counted(s.replicas, 'replica')}"
    if way := plan.flags.get("--af-place-layers"):
        *stages, tail = str(way).partition("/")[0].split(",")
        held = Counter(stages)
        counts = ", ".join(str(held[str(group)]) for group in range(s.attention_groups))
        yield "layers", f"{counts} on the attention groups in turn, the output layer on group {tail}"
    b = plan.batch
    yield "batch", f"{b.global_batch_size} sequences, {b.micro_batches} micro-batches of {b.micro_batch_size}"
    cap = schedule.max_live or "none"
    yield "schedule", (
        f"{schedule.kind}, cap on live activations {cap}, live {schedule.peak_live_attention} (attention), "
        f"{schedule.peak_live_ffn} (FFN)"
    )
    again = ", dispatch again" if lever.redispatch else ""
    recompute = f"recompute {lever.recompute_attention} (attention), {lever.recompute_ffn} (FFN){again}"
    yield "levers", f"{lever.dispatch} dispatch; {recompute}"
    shared = ", distributed optimizer" if lever.distributed_optimizer else ""
    yield "", f"{lever.bytes_per_parameter} bytes a parameter{shared}"


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number > 1 else ''}"


def _on(pool: str, other: str) -> str:
    """Where a side is, if the other is elsewhere."""
    return f", on {pool}" if pool != other else ""


def _uses(ranked: Ranked) -> Table:
    table = Table("side", "resource", "busy", "of the step", title="what binds", box=None)
    for use in uses(ranked):
        table.add_row(use.side, use.resource, f"{use.seconds:.4g} s", f"{use.share:.0%}")
    return table


def _memory(plan: PlanFile) -> Table:
    table = Table("GB on the fullest GPU", "attention", "FFN", title="memory", box=None)
    a, f = plan.memory_gb.attention, plan.memory_gb.ffn
    for name in MemoryRecord.model_fields:
        table.add_row(name.replace("_", " "), f"{getattr(a, name):.1f}", f"{getattr(f, name):.1f}")
    return table


def rows_of_alternatives(outcome: Outcome) -> list[dict[str, Any]]:
    """The ranked plans, best first."""
    best = outcome.ranked[0].step_seconds
    rows = []
    for each in outcome.ranked:
        a = each.evaluation.allocation
        rows.append(
            {
                "step_time_s": each.step_seconds,
                "over_best": each.step_seconds / best - 1,
                "analytic_s": each.analytic_seconds,
                "attention_groups": a.attention_groups,
                "attention_ranks": a.attention_ranks,
                "ffn_groups": a.ffn_groups,
                "ffn_ranks": a.ffn_ranks,
                "replicas": a.replicas,
                "tensor_parallel": a.tensor_parallel,
                "context_parallel": a.context_parallel,
                "expert_tensor_parallel": a.expert_tensor_parallel,
                "layout": a.nodes.value,
                "dispatch": a.dispatch,
                "schedule": a.schedule,
                "recompute_attention": a.recompute_attention.label,
                "recompute_ffn": "redispatch" if a.redispatch else a.recompute_ffn.label,
                "place_layers": a.place_layers,
                "gpus": a.num_gpus,
            }
        )
    return rows


def _alternatives(outcome: Outcome) -> Table:
    table = Table("step", "over", "attention", "FFN", "R", "nodes", "dispatch", "schedule", title="next best", box=None)
    for row in rows_of_alternatives(outcome):
        if row["over_best"] > 1:
            break  # so slow that it only says how few others fit
        tp, cp, etp = row["tensor_parallel"], row["context_parallel"], row["expert_tensor_parallel"]
        placed = "" if row["place_layers"] == IN_TURN else ", placed"
        table.add_row(
            f"{row['step_time_s']:.4g} s",
            f"{row['over_best']:+.1%}",
            f"{row['attention_groups']}x{row['attention_ranks']}{_cut(TP=tp, CP=cp)} "
            f"{row['recompute_attention']}{placed}",
            f"{row['ffn_groups']}x{row['ffn_ranks']}{_cut(ETP=etp)} {row['recompute_ffn']}",
            str(row["replicas"]),
            row["layout"],
            row["dispatch"].removeprefix("per-"),
            row["schedule"].partition("-")[0],
        )
    return table


def _cut(**sizes: int) -> str:
    return "".join(f" {name}{size}" for name, size in sizes.items() if size > 1)


def _sensitivity(varied: Sequence[Variation], here: float) -> Table:
    table = Table("change", "best step (analytic)", "against now", title="sensitivity", box=None)
    for each in varied:
        seconds = "nothing fits" if each.seconds is None else f"{each.seconds:.4g} s"
        change = "" if each.seconds is None else f"{each.seconds / here - 1:+.1%}"
        table.add_row(each.change, seconds, change)
    return table


def render_infeasible(console: Console, request: Request, diagnosis: Diagnosis) -> None:
    """Why nothing fits, and what would."""
    job = request.job
    console.print(
        f"no plan for {request.model.name} on {request.cluster.name} at {job.sequence_length} tokens",
        style="red",
        highlight=False,
    )
    for line in diagnosis.why:
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
    table = Table("smallest change that makes it fit", "step (analytic)", box=None)
    for remedy in diagnosis.remedies:
        table.add_row(remedy.change, f"{remedy.seconds:.4g} s")
    console.print(table if diagnosis.remedies else "no single change tried makes it fit")


def drift_json(found: Drift, remaining_steps: int) -> dict[str, Any]:
    """Numbers of a comparison; null where a plan does not fit, or never pays."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def sizes(mixed: Mixed) -> dict[str, Any]:
        a = mixed.allocation
        return {
            "attention_groups": a.attention_groups,
            "ffn_groups": a.ffn_groups,
            "attention_ranks": a.attention_ranks,
            "ffn_ranks": a.ffn_ranks,
            "replicas": a.replicas,
            "tensor_parallel": a.tensor_parallel,
            "context_parallel": a.context_parallel,
            "expert_tensor_parallel": a.expert_tensor_parallel,
            "step_time_s": finite(mixed.mean),
            "by_length": {str(s.length): finite(t) for s, t in zip(found.mix, mixed.seconds, strict=True)},
        }

    return {
        "pays": found.pays(remaining_steps),
        "remaining_steps": remaining_steps,
        "break_even_steps": finite(found.break_even_steps),
        "reshard_s": found.reshard_seconds,
        "checkpoint_gb": found.checkpoint_gb,
        "current": sizes(found.current),
        "new": sizes(found.best),
    }


def render_drift(console: Console, found: Drift, remaining_steps: int) -> None:
    """The two plans by length, and the verdict."""
    table = Table("plan", *(f"{each.length} ({each.share:.0%})" for each in found.mix), "mean step", box=None)
    for name, mixed in (("now", found.current), ("best for the mix", found.best)):
        times = ("does not fit" if math.isinf(t) else f"{t:.4g} s" for t in (*mixed.seconds, mixed.mean))
        a = mixed.allocation
        sizes = f"{name}: A {a.attention_groups}x{a.attention_ranks}, F {a.ffn_groups}x{a.ffn_ranks}, R {a.replicas}"
        table.add_row(sizes + _cut(TP=a.tensor_parallel, CP=a.context_parallel, ETP=a.expert_tensor_parallel), *times)
    console.print(table)
    cost = f"a checkpoint of {found.checkpoint_gb:,.0f} GB out and in and a restart take {found.reshard_seconds:.0f} s"
    if found.break_even_steps == 0:
        verdict = "the plan in use does not fit this mix: re-allocate"
    elif math.isinf(found.break_even_steps):
        verdict = "the plan in use is as good as any"
    else:
        verdict = f"re-allocating pays after {math.ceil(found.break_even_steps):,} steps"
        pays = "does" if found.pays(remaining_steps) else "does not"
        verdict += f"; for {remaining_steps:,} more it {pays}"
    console.print(f"{cost}; {verdict}", highlight=False, soft_wrap=True)
