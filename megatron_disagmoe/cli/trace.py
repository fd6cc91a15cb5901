"""``disagmoe trace``: merge the traces of all ranks, report busy and exposed time, draw measured beside predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_disagmoe.cli.output import JsonOption, bad_input_exits_2, emit, err_console
from megatron_disagmoe.drawing import Chart, chart_of, write_html
from megatron_disagmoe.drawing.chart import format_time
from megatron_disagmoe.schedules.actions import Schedule
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate
from megatron_disagmoe.simulator.timeline import Timeline
from megatron_disagmoe.tracing.measured import chart_of_step
from megatron_disagmoe.tracing.merge import RankTrace, Transfer, load_traces, match_transfers, write_merged
from megatron_disagmoe.tracing.predicted import describes, fit_costs, load_costs, load_schedule
from megatron_disagmoe.tracing.report import (
    WARM_UP_STEPS,
    RankFigures,
    Step,
    find_steps,
    rank_figures,
    typical_step,
)

app = typer.Typer(add_completion=False, rich_markup_mode=None)

SIMULATED, PREDICTED = "simulated", "predicted"


@app.command()
def trace(
    directory: Path = typer.Argument(help="What training was given as --af-trace-dir."),
    out: Path = typer.Option(help="The merged trace, for ui.perfetto.dev or chrome://tracing."),
    html: Path | None = typer.Option(None, help="Draw a typical step beside its simulation on one page."),
    skip: int = typer.Option(WARM_UP_STEPS, help="Steps to leave out at the start, as long as one is left."),
    as_json: bool = JsonOption,
) -> None:
    """Merge per-rank traces, clocks aligned; report busy and exposed time of every rank."""
    with bad_input_exits_2():
        ranks = load_traces(directory)
        steps = find_steps(ranks, skip=skip)
        transfers, unmatched = match_transfers(ranks)
        if unmatched:
            err_console.print(f"{unmatched} sends or receives have no other end: is a rank's trace missing or cut off?")
        write_merged(ranks, transfers, out)
        figures = rank_figures(ranks, transfers, steps)
        timelines = _simulations(directory, ranks, transfers, steps)
        if html is not None:
            write_html(_charts(ranks, transfers, typical_step(steps), timelines), html, title=f"Trace of {directory}")
    result: dict[str, Any] = {
        "out": str(out),
        "html": None if html is None else str(html),
        "steps": [step.iteration for step in steps],
        "step_time_s": median(figure.step for figure in figures),
        "compute_busy": [figure.compute / figure.step for figure in figures],
        "transfer_busy": [figure.transfer / figure.step for figure in figures],
        "exposed_communication_s": [figure.exposed for figure in figures],
        "ranks": [figure.as_json() for figure in figures],
        "unmatched": unmatched,
    }
    for name, (costs, timeline) in timelines.items():
        result[f"{name}_step_time_s"] = timeline.makespan
        result[f"{name}_costs"] = dataclasses.asdict(costs)
    emit(result, as_json=as_json, render=lambda console: _print(console, figures, result))


def _simulations(
    directory: Path, ranks: Sequence[RankTrace], transfers: Sequence[Transfer], steps: Sequence[Step]
) -> dict[str, tuple[StageCosts, Timeline]]:
    """The schedule run with the measured stage times, and with those it was planned with; empty without a schedule."""
    schedule: Schedule | None = load_schedule(directory)
    if schedule is None:
        return {}
    if not describes(schedule, ranks, typical_step(steps)):
        err_console.print(
            f"the schedule in {directory} is not the one that step {typical_step(steps).iteration} ran: not simulated"
        )
        return {}
    all_costs = {SIMULATED: fit_costs(ranks, transfers, steps), PREDICTED: load_costs(directory)}
    return {name: (costs, simulate(schedule, costs)) for name, costs in all_costs.items() if costs is not None}


def _charts(
    ranks: Sequence[RankTrace],
    transfers: Sequence[Transfer],
    step: Step,
    timelines: dict[str, tuple[StageCosts, Timeline]],
) -> list[Chart]:
    measured = chart_of_step(ranks, transfers, step)
    against = {name: timeline.makespan for name, (_, timeline) in timelines.items()}
    headings = {
        SIMULATED: "Simulated: the same schedule with the measured stage and transfer times",
        PREDICTED: "Predicted: the same schedule with the costs it was planned with",
    }
    return [
        dataclasses.replace(measured, bounds=against),
        *(chart_of(timeline, heading=headings[name], unit="s") for name, (_, timeline) in timelines.items()),
    ]


def _print(console: Console, figures: Sequence[RankFigures], result: dict[str, Any]) -> None:
    table = Table(title=f"Medians of {len(result['steps'])} steps")
    table.add_column("rank")
    for name in ("compute", "sending", "exposed", "exposed", "awaits stage", "other"):
        table.add_column(name, justify="right", no_wrap=True)
    for figure in figures:
        shares = (figure.compute, figure.transfer, figure.exposed, figure.stage_wait, figure.other)
        cells = [f"{100 * share / figure.step:.1f}%" for share in shares]
        cells.insert(2, format_time(figure.exposed, "s"))
        replica = f" replica {figure.replica}" if figure.replica else ""
        table.add_row(f"{figure.rank} {figure.group}{replica}", *cells)
    console.print(table)
    console.print(f"step {format_time(result['step_time_s'], 's')}")
    for name in (SIMULATED, PREDICTED):
        if f"{name}_step_time_s" in result:
            time = result[f"{name}_step_time_s"]
            console.print(f"{name} {format_time(time, 's')} (measured takes {result['step_time_s'] / time:.3f} of it)")
    for key in ("out", "html"):
        if result[key] is not None:
            console.print(f"wrote {result[key]}", soft_wrap=True)
