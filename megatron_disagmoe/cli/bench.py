"""``disagmoe bench``: how fast things are. Each benchmark is a module of ``benchmarks``, imported when asked for."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit, err_console

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

OutOption = Annotated[Path | None, typer.Option(help="Folder for the rows as JSON.", show_default=False)]


@app.callback()
def _bench() -> None:
    """Benchmarks: JSON and a picture each."""


@app.command()
def simulator(out: OutOption = None, as_json: bool = JsonOption) -> None:
    """Actions that the event engine simulates in a second, on one core."""
    with bad_input_exits_2():
        from megatron_disagmoe.benchmarks.simulator import measure

        rows = [row.as_json() for row in measure()]
        result = finish("simulator", rows, out)
    emit(result, as_json=as_json, render=lambda console: _show_simulator(console, rows))
    if not all(row["holds"] for row in rows):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def builders(
    out: OutOption = None,
    parts: Annotated[str | None, typer.Option(help="Names, with commas.", show_default="all of them")] = None,
    as_json: bool = JsonOption,
) -> None:
    """How near the builders' schedules come to the lower bounds, simulated, and how long building takes."""
    with bad_input_exits_2():
        from megatron_disagmoe.benchmarks import builders as benchmark

        rows = benchmark.measure(
            benchmark.named(parts), progress=lambda text: err_console.print(text, highlight=False)
        )
        result = finish("builders", rows, out)
        if out is not None:
            from megatron_disagmoe.benchmarks.builders_picture import draw

            draw(rows, out / "builders.png")
            result["picture"] = str(out / "builders.png")
    emit(result, as_json=as_json, render=lambda console: _show_builders(console, rows))
    if not all(row["holds"] for row in rows):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def transport(
    out: OutOption = None,
    sizes: Annotated[str, typer.Option(help="M x N, several with commas.")] = "1x1,2x2,3x1,1x3",
    links: Annotated[str, typer.Option(help="Limits in Gbit/s, with commas; none: this machine as it is.")] = "none,1",
    as_json: bool = JsonOption,
) -> None:
    """Bytes, bandwidth each way and overlap of both transports in every dispatch mode, beside gloo's own.

    A limited link needs root: hosts are network namespaces.
    """
    with bad_input_exits_2(), tempfile.TemporaryDirectory(prefix="disagmoe-bench-") as scratch:
        from megatron_disagmoe.benchmarks import transport as benchmark

        rows = benchmark.measure(
            (out or Path(scratch)) / "logs",
            sizes=benchmark.parse_sizes(sizes),
            links=benchmark.parse_links(links),
            progress=lambda text: err_console.print(text, highlight=False),
        )
        result = finish("transport", rows, out)
        if out is not None:
            from megatron_disagmoe.benchmarks.transport_picture import draw

            draw(rows, out / "transport.png")
            result["picture"] = str(out / "transport.png")
    emit(result, as_json=as_json, render=lambda console: _show_transport(console, rows))


@app.command()
def shaped(
    out: OutOption = None,
    model: Annotated[str, typer.Option(help="balanced, or ffn-heavy where AF-pipe should not win.")] = "balanced",
    hosts: Annotated[str, typer.Option(help="Numbers of hosts, with commas.")] = "2",
    links: Annotated[str, typer.Option(help="Limits in Gbit/s, with commas; none: unlimited.")] = "none,2,1,0.5,0.25",
    transports: Annotated[str, typer.Option(help="Of AF-pipe, with commas.")] = "torch,nixl",
    dispatch: Annotated[str, typer.Option(help="Of AF-pipe, with commas.")] = "per-expert,per-rank,per-node",
    schedules: Annotated[str, typer.Option(help="With commas.")] = "sequential,interleaved-1f1b,split-backward",
    repeats: Annotated[int, typer.Option(help="Steps of each variant at each limit, taken in turn.")] = 5,
    as_json: bool = JsonOption,
) -> None:
    """Vanilla Megatron against AF-pipe on hosts whose links are limited, step for step in one run.

    Needs root: hosts are network namespaces. They are removed however the run ends.
    """
    with bad_input_exits_2(), tempfile.TemporaryDirectory(prefix="disagmoe-bench-") as scratch:
        from megatron_disagmoe.benchmarks.shaped import options
        from megatron_disagmoe.benchmarks.shaped.measure import measure

        chosen = options.model(model)
        variants = options.variants(transports, dispatch, schedules)
        rows = [
            row
            for count in options.counts(hosts)
            for row in measure(
                chosen,
                variants,
                hosts=count,
                links=options.links(links),
                repeats=repeats,
                folder=(out or Path(scratch)) / f"{count}-hosts",
                progress=lambda text: err_console.print(text, highlight=False),
            )
        ]
        result = finish("shaped", rows, out)
        result["why"] = chosen.why
        if out is not None:
            from megatron_disagmoe.benchmarks.shaped.picture import draw

            draw(rows, out / "shaped.png")
            result["picture"] = str(out / "shaped.png")
    emit(result, as_json=as_json, render=lambda console: _show_shaped(console, rows))
    if not all(row["losses_equal"] for row in rows):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def _show_shaped(console: Console, rows: list[dict[str, Any]]) -> None:
    from megatron_disagmoe.benchmarks.shaped.table import table

    console.print(table(rows))


@app.command()
def schedule(
    out: OutOption = None,
    cases: Annotated[str | None, typer.Option(help="Names, with commas.", show_default="all of them")] = None,
    stage_ms: Annotated[float, typer.Option(min=1.0, help="What a stage sleeps.")] = 50.0,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each case.")] = 3,
    traces: Annotated[bool, typer.Option("--traces", help="Write traces too.", show_default=False)] = False,
    as_json: bool = JsonOption,
) -> None:
    """Step times of real processes with emulated stages and ports, beside the simulated ones and the lower bound."""
    with bad_input_exits_2(), tempfile.TemporaryDirectory(prefix="disagmoe-bench-") as scratch:
        from megatron_disagmoe.benchmarks import schedule as benchmark

        if traces and out is None:
            raise ValueError("--traces without --out: name the folder to write them to")
        rows = benchmark.measure(
            benchmark.named(cases),
            Path(scratch),
            unit_seconds=stage_ms / 1e3,
            repeats=repeats,
            traces=out / "traces" if traces and out is not None else None,
        )
        result = finish("schedule", rows, out)
        if out is not None:
            from megatron_disagmoe.benchmarks.schedule_picture import draw

            draw(rows, out / "schedule.png")
            result["picture"] = str(out / "schedule.png")
    emit(result, as_json=as_json, render=lambda console: _show_schedule(console, rows))
    if not all(row["holds"] for row in rows):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def executor(out: OutOption = None, as_json: bool = JsonOption) -> None:
    """What the executor costs a rank beyond Megatron's modules, on the smallest of models."""
    with bad_input_exits_2(), tempfile.TemporaryDirectory(prefix="disagmoe-bench-") as scratch:
        from megatron_disagmoe.benchmarks.executor import CASES, measure

        rows = measure(CASES, Path(scratch))
        result = finish("executor", rows, out)
    emit(result, as_json=as_json, render=lambda console: _show_executor(console, rows))
    if not all(row["holds"] for row in rows):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def tracing(
    out: OutOption = None,
    steps: Annotated[int, typer.Option(min=2, help="Training steps, half of them traced.")] = 120,
    as_json: bool = JsonOption,
) -> None:
    """What --af-trace-dir costs: the quickstart's model on four ranks, every other step traced."""
    with bad_input_exits_2(), tempfile.TemporaryDirectory(prefix="disagmoe-bench-") as scratch:
        from megatron_disagmoe.benchmarks.tracing import measure

        rows = measure((out or Path(scratch)) / "tracing", steps=steps)
        result = finish("tracing", rows, out)
    emit(result, as_json=as_json, render=lambda console: _show_tracing(console, rows))
    if not all(row["holds"] for row in rows):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def finish(name: str, rows: list[dict[str, Any]], out: Path | None) -> dict[str, Any]:
    """The result to print; with ``out`` also written to ``NAME.json`` there."""
    result: dict[str, Any] = {"rows": rows}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{name}.json"
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        result = {**result, "out": str(path)}
    return result


def _show_simulator(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Actions per second, one core")
    for name in ("groups", "layers", "micro-batches", "lanes", "actions", "simulated", "with reading"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["groups"]),
            str(row["layers"]),
            str(row["micro_batches"]),
            "yes" if row["lanes"] else "no",
            f"{row['compute_actions'] + row['transfers']:,}",
            f"{row['actions_per_second']:,.0f}",
            f"{row['actions_per_second_with_reading']:,.0f}",
        )
    console.print(table)


def _show_builders(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Makespan over the lower bound; live activations over L", box=None, padding=(0, 1, 0, 0))
    table.add_column("part", no_wrap=True)
    for name in ("A+F", "L n", "A F M2N tail", "cap", "live", "bound", "over it", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        table.add_row(
            row["part"],
            f"{row['attention_groups']}+{row['ffn_groups']}",
            f"{row['layers']} {row['micro_batches']}",
            " ".join(f"{row[name]:.2g}" for name in ("attention", "ffn", "transfer", "tail")),
            str(row["max_live"] or "-"),
            f"{row['live'] / row['layers']:.2f}",
            row["bound"],
            f"{row['over_bound']:.4f}",
            f"{row['seconds']:.2f}",
            "" if row["holds"] else f"not {row['bar']:g}",
        )
    console.print(table)


def _show_transport(console: Console, rows: list[dict[str, Any]]) -> None:
    title = "Both directions busy at once: Gbit/s each way, or the share of the limit"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for name in ("transport", "dispatch", "MxN", "limit"):
        table.add_column(name, no_wrap=True)
    for name in ("MB A-F", "fewer rows", "each way", "loop", "overlap"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        link, fewer = row["link_gbit_per_s"], row["fewer_rows"]
        ways = [row["forward_gbit_per_s"], row["reverse_gbit_per_s"]] if link is None else _shares(row)
        table.add_row(
            row["transport"],
            row["dispatch"] or "-",
            f"{row['attention_ranks']}x{row['ffn_ranks']}",
            "none" if link is None else f"{link:g}",
            f"{row['forward_bytes'] / 1e6:.1f}",
            "-" if fewer is None else f"{fewer:.2f}",
            " ".join(f"{way:.2f}" for way in ways),
            f"{row['compute_slowdown']:+.1%}",
            f"{row['overlap']:.0%}",
        )
    console.print(table)


def _shares(row: dict[str, Any]) -> list[float]:
    return [row["forward_fraction"], row["reverse_fraction"]]


def _show_schedule(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Seconds a step; stages sleep, transfers take their time on emulated ports")
    table.add_column("case")
    for name in ("bound", "simulated", "measured", "least", "most", "measured / simulated", "measured / bound"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = ("fill_bound_s", "simulated_s", "measured_s", "measured_min_s", "measured_max_s")
        ratios = ("measured_over_simulated", "measured_over_fill_bound")
        table.add_row(row["case"], *(f"{row[name]:.3f}" for name in (*seconds, *ratios)))
    console.print(table)


def _show_executor(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Microseconds of processor time, least of the steps and median")
    for name in ("group", "schedule", "transport", "dispatch"):
        table.add_column(name)
    for name in ("ours, an action", "median", "ours, a compute action", "median", "modules, a compute action"):
        table.add_column(name, justify="right")
    for row in rows:
        columns = ("overhead_us_per_action", "overhead_us_per_compute_action")
        both = [name for column in columns for name in (column, f"median_{column}")]
        names = (row[name] for name in ("group", "schedule", "transport", "dispatch"))
        table.add_row(*names, *(f"{row[name]:.0f}" for name in (*both, "modules_us_per_compute_action")))
    console.print(table)


def _show_tracing(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="A step with traces against one without: medians, and 95% of where they may lie")
    table.add_column("group")
    for name in ("ms without", "ms with", "longer by", "processor time: ms without", "ms with", "more by"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = []
        for name in ("wall", "processor"):
            low, high = (100 * row[f"{name}_overhead_{end}"] for end in ("low", "high"))
            cells += [f"{row[f'{name}_ms_{kind}']:.1f}" for kind in ("plain", "traced")]
            cells.append(f"{100 * row[f'{name}_overhead']:.1f}% ({low:.1f} to {high:.1f})")
        table.add_row(row["group"], *cells)
    console.print(table)


@app.command()
def planner(
    out: OutOption = None,
    part: Annotated[str, typer.Option(help="emulated, real (needs root: hosts are namespaces), or all.")] = "all",
    links: Annotated[str, typer.Option(help="Of the real part: limits in Gbit/s, with commas.")] = "1,0.5,0.25",
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each case.")] = 5,
    as_json: bool = JsonOption,
) -> None:
    """Step times as the planner predicts them, beside what processes take."""
    with bad_input_exits_2(), tempfile.TemporaryDirectory(prefix="disagmoe-bench-") as scratch:
        from megatron_disagmoe.benchmarks import planner as benchmark
        from megatron_disagmoe.benchmarks.shaped import options

        if part not in ("emulated", "real", "all"):
            raise ValueError(f"--part {part}: choose emulated, real or all")
        limits = [link for link in options.links(links) if link is not None]
        rows: list[dict[str, Any]] = []

        def tell(text: str) -> None:
            err_console.print(text, highlight=False)

        if part != "real":
            rows += benchmark.measure_emulated(Path(scratch) / "emulated", repeats=repeats, progress=tell)
        if part != "emulated":
            rows += benchmark.measure_real(Path(scratch) / "real", repeats=repeats, links=limits, progress=tell)
        result = finish("planner", rows, out)
    emit(result, as_json=as_json, render=lambda console: _show_planner(console, rows))
    if not all(row["holds"] for row in rows):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def _show_planner(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("allocation", "predicted", "measured", "error", "holds", box=None)
    for row in rows:
        if row["kind"] == "choice":
            place = f"measured best: {row['measured_best']}, predicted place {row['measured_best_predicted_place']}"
            table.add_row(f"choice {row['allocation']}", "", place, f"{row['relative_error']:+.1%}", _mark(row))
            continue
        times = (f"{row['predicted_s']:.3f} s", f"{row['measured_s']:.3f} s")
        table.add_row(row["allocation"], *times, f"{row['relative_error']:+.1%}", _mark(row))
    console.print(table)


def _mark(row: dict[str, Any]) -> str:
    return "yes" if row["holds"] else "no"
