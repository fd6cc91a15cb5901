"""``disagmoe bench``: how fast things are. Each benchmark is a module of ``benchmarks``, imported when asked for."""

from __future__ import annotations

import contextlib
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from megatron_disagmoe.cli import bench_tables as tables
from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit, err_console

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

OutOption = Annotated[Path | None, typer.Option(help="Folder for the rows as JSON.", show_default=False)]


@app.callback()
def _bench() -> None:
    """Benchmarks: JSON and a picture each."""


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for the length of a block, in which bad input exits 2."""
    with bad_input_exits_2(), tempfile.TemporaryDirectory(prefix="disagmoe-bench-") as folder:
        yield Path(folder)


def _tell(text: str) -> None:
    """Progress."""
    err_console.print(text, highlight=False)


def _report(
    name: str,
    rows: list[dict[str, Any]],
    out: Path | None,
    *,
    as_json: bool,
    table: Callable[[list[dict[str, Any]]], Table],
    picture: str | None = None,
    holds: str | None = "holds",
    **more: Any,
) -> None:
    """Write the rows into ``out``, if there is one, and print them.

    Args:
        name: of the benchmark and its files.
        table: what people see.
        picture: module whose ``draw(rows, path)`` makes one; None for none.
        holds: the column that must be true in every row, or the exit code is 1; None where nothing is checked.
        more: what the result holds beside the rows.
    """
    result: dict[str, Any] = {"rows": rows}
    if out is not None:
        with bad_input_exits_2():
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{name}.json"
            path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            result["out"] = str(path)
            if picture is not None:
                importlib.import_module(f"megatron_disagmoe.benchmarks.{picture}").draw(rows, out / f"{name}.png")
                result["picture"] = str(out / f"{name}.png")
    result.update(more)
    emit(result, as_json=as_json, render=lambda console: console.print(table(rows)))
    if holds is not None and not all(row[holds] for row in rows):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def simulator(out: OutOption = None, as_json: bool = JsonOption) -> None:
    """Actions that the event engine simulates in a second, on one core."""
    with bad_input_exits_2():
        from megatron_disagmoe.benchmarks.simulator import measure

        rows = [row.as_json() for row in measure()]
    _report("simulator", rows, out, as_json=as_json, table=tables.simulator)


@app.command()
def builders(
    out: OutOption = None,
    parts: Annotated[str | None, typer.Option(help="Names, with commas.", show_default="all of them")] = None,
    as_json: bool = JsonOption,
) -> None:
    """How near the builders' schedules come to the lower bounds, simulated, and how long building takes."""
    with bad_input_exits_2():
        from megatron_disagmoe.benchmarks import builders as benchmark

        rows = benchmark.measure(benchmark.named(parts), progress=_tell)
    _report("builders", rows, out, as_json=as_json, table=tables.builders, picture="builders_picture")


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
    with _scratch() as scratch:
        from megatron_disagmoe.benchmarks import transport as benchmark

        rows = benchmark.measure(
            (out or scratch) / "logs",
            sizes=benchmark.parse_sizes(sizes),
            links=benchmark.parse_links(links),
            progress=_tell,
        )
    _report(
        "transport", rows, out, as_json=as_json, table=tables.transport, picture="transport_picture", holds=None
    )


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
    with _scratch() as scratch:
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
                folder=(out or scratch) / f"{count}-hosts",
                progress=_tell,
            )
        ]
    _report(
        "shaped",
        rows,
        out,
        as_json=as_json,
        table=tables.shaped,
        picture="shaped.picture",
        holds="losses_equal",
        why=chosen.why,
    )


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
    with _scratch() as scratch:
        from megatron_disagmoe.benchmarks import schedule as benchmark

        if traces and out is None:
            raise ValueError("--traces without --out: name the folder to write them to")
        rows = benchmark.measure(
            benchmark.named(cases),
            scratch,
            unit_seconds=stage_ms / 1e3,
            repeats=repeats,
            traces=out / "traces" if traces and out is not None else None,
        )
    _report("schedule", rows, out, as_json=as_json, table=tables.schedule, picture="schedule_picture")


@app.command()
def executor(out: OutOption = None, as_json: bool = JsonOption) -> None:
    """What the executor costs a rank beyond Megatron's modules, on the smallest of models."""
    with _scratch() as scratch:
        from megatron_disagmoe.benchmarks.executor import CASES, measure

        rows = measure(CASES, scratch)
    _report("executor", rows, out, as_json=as_json, table=tables.executor)


@app.command()
def tracing(
    out: OutOption = None,
    steps: Annotated[int, typer.Option(min=2, help="Training steps, half of them traced.")] = 120,
    as_json: bool = JsonOption,
) -> None:
    """What --af-trace-dir costs: the quickstart's model on four ranks, every other step traced."""
    with _scratch() as scratch:
        from megatron_disagmoe.benchmarks.tracing import measure

        rows = measure((out or scratch) / "tracing", steps=steps)
    _report("tracing", rows, out, as_json=as_json, table=tables.tracing)


@app.command()
def planner(
    out: OutOption = None,
    part: Annotated[str, typer.Option(help="emulated, real (needs root: hosts are namespaces), or all.")] = "all",
    links: Annotated[str, typer.Option(help="Of the real part: limits in Gbit/s, with commas.")] = "1,0.5,0.25",
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each case.")] = 5,
    as_json: bool = JsonOption,
) -> None:
    """Step times as the planner predicts them, beside what processes take."""
    with _scratch() as scratch:
        from megatron_disagmoe.benchmarks import planner as benchmark
        from megatron_disagmoe.benchmarks.shaped import options

        if part not in ("emulated", "real", "all"):
            raise ValueError(f"--part {part}: choose emulated, real or all")
        limits = [link for link in options.links(links) if link is not None]
        rows: list[dict[str, Any]] = []
        if part != "real":
            rows += benchmark.measure_emulated(scratch / "emulated", repeats=repeats, progress=_tell)
        if part != "emulated":
            rows += benchmark.measure_real(scratch / "real", repeats=repeats, links=limits, progress=_tell)
    _report("planner", rows, out, as_json=as_json, table=tables.planner)
