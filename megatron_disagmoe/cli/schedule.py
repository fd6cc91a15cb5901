"""``disagmoe schedule``: build, verify and draw pipeline schedules."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_disagmoe import builders
from megatron_disagmoe.builders.frontier import Point, default_caps
from megatron_disagmoe.builders.frontier import frontier as frontier_of
from megatron_disagmoe.builders.placement import placed
from megatron_disagmoe.cli import costs as cost_flags
from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit, err_console
from megatron_disagmoe.schedules.actions import Placement, Schedule
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.schedules.text import load, save
from megatron_disagmoe.schedules.verifier import Report, draw_grid
from megatron_disagmoe.schedules.verifier import verify as verify_schedule
from megatron_disagmoe.simulator.bounds import Bounds, Workload, lower_bounds
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate, simulate_orders
from megatron_disagmoe.simulator.step_bound import step_bound
from megatron_disagmoe.simulator.timeline import Timeline

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

ScheduleFile = Annotated[Path, typer.Argument(metavar="FILE", help="A schedule file.", show_default=False)]


@app.callback()
def _schedule() -> None:
    """Build, verify and draw pipeline schedules."""


@app.command()
def build(
    attention_groups: Annotated[int, typer.Option(min=1, help="Attention groups.", show_default=False)],
    layers: Annotated[int, typer.Option(min=1, help="MoE layers.", show_default=False)],
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.", show_default=False)],
    ffn_groups: Annotated[int | None, typer.Option(min=1, show_default="as many")] = None,
    t_attention: cost_flags.Attention = None,
    t_ffn: cost_flags.Ffn = None,
    t_transfer: cost_flags.Transfer = None,
    t_combine: cost_flags.Combine = None,
    t_lane: cost_flags.Lane = None,
    t_tail: cost_flags.Tail = None,
    t_embedding: cost_flags.Embedding = None,
    backward_ratio: cost_flags.BackwardRatio = None,
    weight_fraction: cost_flags.WeightFraction = None,
    recompute_attention: cost_flags.RecomputeAttention = None,
    recompute_ffn: cost_flags.RecomputeFfn = None,
    kind: Annotated[str | None, typer.Option(help="Which builder.", show_default="interleaved-1f1b")] = None,
    split_backward: Annotated[
        bool, typer.Option("--split-backward", help="Short for --kind split-backward.", show_default=False)
    ] = False,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches that go round together.", show_default="the best")
    ] = None,
    max_live: Annotated[
        int | None, typer.Option(min=1, help="Cap on the activations alive on a group.", show_default="no cap")
    ] = None,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="For evaluation.", show_default=False)] = False,
    redispatch: Annotated[
        bool, typer.Option("--redispatch", help="FFN groups drop what they get, and get it again.", show_default=False)
    ] = False,
    order_messages: Annotated[
        bool,
        typer.Option(
            "--order-messages",
            help="Where that is faster, also fix the order in which ports serve messages.",
            show_default=False,
        ),
    ] = False,
    place_layers: Annotated[
        str,
        typer.Option(
            help="round-robin (in-turn); balanced: fewer layers on the groups of a long tail and embedding; or the "
            "group of every attention stage, the tail last, as in 0,1,0,1,1."
        ),
    ] = "round-robin",
    frontier: Annotated[
        bool,
        typer.Option("--frontier", help="Print and draw step time against live activations.", show_default=False),
    ] = False,
    frontier_caps: Annotated[
        str | None, typer.Option(help="Caps to try, such as 9,16,64.", show_default="nine from the least to 4 L")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Schedule file; with --frontier also a picture beside it, or only a .png, .svg or .pdf."),
    ] = None,
    as_json: bool = JsonOption,
) -> None:
    """Build a schedule for given stage times, prove it safe, say how near the lower bounds it is."""
    with bad_input_exits_2():
        costs = cost_flags.costs_of(
            {
                "attention": t_attention,
                "ffn": t_ffn,
                "transfer": t_transfer,
                "combine": t_combine,
                "lane": t_lane,
                "tail": t_tail,
                "embedding": t_embedding,
                "backward_ratio": backward_ratio,
                "weight_fraction": weight_fraction,
                "recompute_attention": recompute_attention,
                "recompute_ffn": recompute_ffn,
            }
        )
        kind = _kind(kind, split_backward=split_backward)
        placement = _placement(layers, attention_groups, ffn_groups or attention_groups, place_layers, costs)
        _check_cap(placement, max_live, forward_only=forward_only)
        outs = _outs(out, frontier=frontier)
        points: list[Point] | None = None
        if frontier:
            caps = _caps(placement, frontier_caps)
            points = _frontier(placement, kind, micro_batches, costs, caps, outs.picture, order_messages=order_messages)
        result: dict[str, Any] = {}
        report: Report | None = None
        if redispatch:
            costs = dataclasses.replace(costs, recompute_ffn=1.0)  # nothing is kept, so all is run again
        if outs.schedule is not None:
            schedule = builders.build(
                kind,
                placement,
                num_micro_batches=micro_batches,
                costs=costs,
                group_size=group_size,
                max_live=max_live,
                forward_only=forward_only,
                redispatch=redispatch,
                order_messages=order_messages,
            )
            report = verify_schedule(schedule, max_live=max_live)
            result = {"out": str(out), "ok": report.ok, **_figures(report, costs, max_live), **schedule.parameters}
            save(schedule, outs.schedule)
    if points is not None:
        result["frontier"] = [point.as_json() for point in points]
        result["frontier_out"] = None if outs.picture is None else str(outs.picture)
    emit(result, as_json=as_json, render=lambda console: _show_built(console, report, result))
    if report is not None and not report.ok:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def draw(
    file: ScheduleFile,
    out: Annotated[
        Path | None,
        typer.Option(help="A .png, .svg, .pdf or .html file.", show_default="in the terminal"),
    ] = None,
    t_attention: cost_flags.Attention = None,
    t_ffn: cost_flags.Ffn = None,
    t_transfer: cost_flags.Transfer = None,
    t_tail: cost_flags.Tail = None,
    backward_ratio: cost_flags.BackwardRatio = None,
    as_json: bool = JsonOption,
) -> None:
    """Draw a schedule as it would run, with the costs in its file or those given here."""
    with bad_input_exits_2():
        from megatron_disagmoe.drawing import chart_of, draw_chart, print_chart

        schedule = load(file)
        given = {"attention": t_attention, "ffn": t_ffn, "transfer": t_transfer, "tail": t_tail}
        recorded = cost_flags.recorded_costs(schedule)
        costs = cost_flags.costs_of({**given, "backward_ratio": backward_ratio}, otherwise=recorded)
        timeline = _simulated(schedule, costs, file)
        bounds = lower_bounds(Workload.of(schedule, costs))
        chart = chart_of(timeline, bounds={"fill_bound": bounds.fill, "busy_bound": bounds.busy})
        if out is not None:
            draw_chart(chart, out)
    result = {
        "out": None if out is None else str(out),
        "makespan": timeline.makespan,
        **_bounds(bounds),
        "costs": dataclasses.asdict(costs),
    }

    def render(console: Console) -> None:
        if out is None:
            print_chart(chart, console)
        else:
            console.print(f"{chart.facts}\nwrote {out}", markup=False, highlight=False, soft_wrap=True)

    emit(result, as_json=as_json, render=render)


def _simulated(schedule: Schedule, costs: StageCosts, file: Path) -> Timeline:
    try:
        return simulate(schedule, costs)
    except ValueError as error:
        raise ValueError(
            f"{file} cannot run: its groups wait for each other ({error}); disagmoe schedule verify {file} shows where"
        ) from error


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


def _placement(layers: int, attention_groups: int, ffn_groups: int, way: str, costs: StageCosts) -> Placement:
    if way == "round-robin":
        way = "in-turn"
    try:
        return placed(
            way, num_layers=layers, num_attention_groups=attention_groups, num_ffn_groups=ffn_groups, costs=costs
        )
    except ValueError as error:
        text = str(error).replace("--af-", "--")
        raise ValueError(text if text.startswith("--") else f"--place-layers {text}") from error


def _kind(kind: str | None, *, split_backward: bool) -> str:
    if kind is not None and kind not in builders.KINDS:
        raise ValueError(f"--kind {kind}: choose among {', '.join(builders.KINDS)}")
    if split_backward and kind not in (None, "split-backward"):
        raise ValueError(f"--kind {kind} has whole backwards; leave out --split-backward, or leave out --kind")
    return "split-backward" if split_backward else kind or "interleaved-1f1b"


def _check_cap(placement: Placement, max_live: int | None, *, forward_only: bool) -> None:
    least = builders.least_live(placement, forward_only=forward_only)
    if max_live is not None and max_live < least:
        raise ValueError(
            f"--max-live {max_live} is too low for any order: one micro-batch alone needs {least} live activations on "
            f"a group; allow at least {least}, or spread the layers over more groups"
        )


class _Outs(NamedTuple):
    schedule: Path | None
    picture: Path | None


def _outs(out: Path | None, *, frontier: bool) -> _Outs:
    """What to write, and where."""
    if not frontier:
        if out is None:
            raise ValueError("--out is missing: name the file to write the schedule to")
        return _Outs(out, None)
    if out is None or out.suffix.lower() in (".png", ".svg", ".pdf"):
        return _Outs(None, out)
    return _Outs(out, out.with_suffix(".frontier.svg"))


def _caps(placement: Placement, caps: str | None) -> list[int]:
    """What ``--frontier-caps`` says, or the usual ones."""
    if caps is None:
        return default_caps(placement)
    words = caps.replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words):
        raise ValueError(f"--frontier-caps {caps!r} is not a list of whole numbers, such as 9,16,64")
    tried = sorted({int(word) for word in words})
    least = builders.least_live(placement)
    if tried[0] < least:
        raise ValueError(f"--frontier-caps: {tried[0]} is too low for any order; the least is {least}")
    return tried


def _frontier(
    placement: Placement,
    kind: str,
    micro_batches: int,
    costs: StageCosts,
    caps: list[int],
    picture: Path | None,
    *,
    order_messages: bool,
) -> list[Point]:
    """The points of the frontier, drawn into ``picture``; progress on standard error."""
    points: list[Point] = []
    for point in frontier_of(
        placement,
        kind=kind,
        num_micro_batches=micro_batches,
        costs=costs,
        caps=caps,
        order_messages=order_messages,
    ):
        points.append(point)
        err_console.print(f"{point.lever}, at most {point.max_live} alive: {point.makespan:.6g}", highlight=False)
    if picture is not None:
        from megatron_disagmoe.drawing.frontier import draw_frontier

        heading = (
            f"{kind}: {placement.num_attention_groups} attention and {placement.num_ffn_groups} FFN groups, "
            f"{placement.num_layers} layers, {micro_batches} micro-batches"
        )
        draw_frontier(points, picture, heading=heading)
    return points


def _figures(report: Report, costs: StageCosts, max_live: int | None) -> dict[str, object]:
    """What the schedule takes and holds, beside the least it could take."""
    orders = Orders.of(report.schedule)
    makespan = simulate_orders(orders, costs).makespan
    workload = Workload.of(orders, costs)
    bounds = lower_bounds(workload, max_live=max_live)
    return {
        "makespan": makespan,
        **_bounds(bounds),
        "cap_bound": bounds.cap,
        "step_bound": step_bound(workload, max_live=max_live),
        "makespan_over_fill_bound": makespan / bounds.fill,
        "peak_live": {str(group): peak for group, peak in report.peak_live.items()},
        "actions": report.num_actions,
    }


def _bounds(bounds: Bounds) -> dict[str, float]:
    return {"busy_bound": bounds.busy, "fill_bound": bounds.fill, "phase_bound": bounds.phase}


def _show_built(console: Console, report: Report | None, result: dict[str, Any]) -> None:
    if "frontier" in result:
        _show_frontier(console, result)
    if report is None:
        return
    makespan = result["makespan"]
    lines = [f"makespan     {makespan:.6g}"]
    for name in ("busy", "fill", "phase", "cap", "step"):
        bound = result[f"{name}_bound"]
        if name != "cap" or result["max_live"] is not None:
            lines.append(f"{name + ' bound':<12} {bound:.6g}  (makespan is {makespan / bound:.4f} of it)")
    live = ", ".join(f"{group} {peak}" for group, peak in result["peak_live"].items())
    lines += [f"live at most {live}", f"wrote {result['out']}"]
    if not report.ok:
        lines.insert(0, report.explain())
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _show_frontier(console: Console, result: dict[str, Any]) -> None:
    table = Table(title="Step time against live activations")
    for name in ("lever", "cap", "step time", "of its lower bound", "alive on A", "alive on F"):
        table.add_column(name, justify="left" if name == "lever" else "right")
    for point in result["frontier"]:
        table.add_row(
            point["lever"],
            str(point["max_live"]),
            f"{point['makespan']:.6g}",
            f"{point['makespan_over_bound']:.3f}",
            str(point["live_attention"]),
            str(point["live_ffn"]),
        )
    console.print(table)
    if result["frontier_out"] is not None:
        console.print(f"wrote {result['frontier_out']}", markup=False, highlight=False, soft_wrap=True)
