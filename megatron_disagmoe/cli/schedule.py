"""``disagmoe schedule``: build, verify and draw pipeline schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit
from megatron_disagmoe.schedules.text import load
from megatron_disagmoe.schedules.verifier import Report, draw_grid
from megatron_disagmoe.schedules.verifier import verify as verify_schedule

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

ScheduleFile = Annotated[Path, typer.Argument(metavar="FILE", help="A schedule file.", show_default=False)]


@app.callback()
def _schedule() -> None:
    """Build, verify and draw pipeline schedules."""


@app.command()
def verify(
    file: ScheduleFile,
    max_live: Annotated[
        int | None, typer.Option(min=1, help="Fail where a group holds more activations.", show_default="no cap")
    ] = None,
    max_posted: Annotated[
        int | None,
        typer.Option(min=1, help="Fail where more receives are outstanding on a channel.", show_default="no cap"),
    ] = None,
    as_json: bool = JsonOption,
) -> None:
    """Prove a schedule safe to run, or show each fault and the actions around it.

    A schedule without transfers is completed first, as a run would.
    """
    with bad_input_exits_2():
        report = verify_schedule(load(file), max_live=max_live, max_posted=max_posted)
    emit(_verdict(report), as_json=as_json, render=lambda console: _show_verdict(report, console))
    if not report.ok:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def _verdict(report: Report) -> dict[str, object]:
    return {
        "ok": report.ok,
        "errors": [fault.to_json(draw_grid(report.schedule, fault)) for fault in report.faults],
        "error_counts": {kind.value: count for kind, count in report.counts.items()},
        "peak_live": {str(group): peak for group, peak in report.peak_live.items()},
        "peak_posted": {str(channel): peak for channel, peak in report.peak_posted.items()},
        "actions": report.num_actions,
    }


def _show_verdict(report: Report, console: Console) -> None:
    if not report.ok:
        console.print(report.explain(), markup=False, highlight=False, soft_wrap=True)
    group, live = max(report.peak_live.items(), key=lambda item: item[1])
    summary = (
        f"{len(report.peak_live)} groups, {report.num_actions} actions: at most {live} live activations (on {group}), "
        f"{max(report.peak_posted.values(), default=0)} receives outstanding on a channel"
    )
    verdict = "safe" if report.ok else f"not safe, {sum(report.counts.values())} faults"
    console.print(f"{verdict}; {summary}", markup=False, highlight=False, soft_wrap=True)
