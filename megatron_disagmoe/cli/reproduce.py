"""``disagmoe reproduce``: the paper's figures by simulation, beside its numbers; and what lies beyond them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit, err_console

if TYPE_CHECKING:
    from megatron_disagmoe.reproduction.constants import Constants

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_MORE = ("beyond", "bars", "ceiling", "sensitivity", "executor")


@app.command()
def reproduce(
    figure: Annotated[
        str,
        typer.Argument(
            help="fig5, fig6a, fig10 to fig14, all; beyond, bars, ceiling, sensitivity, executor.", show_default=False
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for rows, tables and pictures.", show_default=False)] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="At once.", show_default="all cores")] = None,
    studies: Annotated[
        str | None, typer.Option(help="With beyond: names, with commas.", show_default="all of them")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With beyond: leave out what --out has from a run that was cut off.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of another constant, for figures and ceiling.", show_default=False),
    ] = None,
    as_json: bool = JsonOption,
) -> None:
    """Re-create figures by simulation and compare; exit code 1 where a row misses its tolerance.

    beyond: what the paper leaves out, and a fair rival. bars: what this project holds itself to. ceiling: the rows with
    AF-pipe at its lower bound. sensitivity: the predictions across every constant's range. executor: the event engine
    beside real processes with sleeping stages.
    """
    with bad_input_exits_2():
        cores = processes or len(os.sched_getaffinity(0))
        constants = _constants(changes or [])
        if figure in _MORE:
            if changes and figure != "ceiling":
                raise ValueError(f"--set is for figures and ceiling, not for {figure}: leave it out")
            result, holds = _more(figure, out, cores, constants, studies, resume)
        else:
            result, holds = _figures(figure, out, cores, constants)
    emit(result, as_json=as_json, render=lambda console: show(console, result))
    if not holds:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def _constants(changes: list[str]) -> Constants:
    """As fixed, but for ``changes``."""
    from megatron_disagmoe.reproduction.constants import ORIGINS, Constants

    constants = Constants()
    for change in changes:
        name, _, value = change.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"--set {change}: write NAME=NUMBER, NAME one of {', '.join(ORIGINS)}") from None
        constants = constants.with_(name, number)
        origin = ORIGINS[name]
        if not origin.low <= number <= origin.high:
            raise ValueError(f"--set {change}: {name} is between {origin.low:g} and {origin.high:g}")
    return constants


def _figures(
    name: str, out: Path | None, processes: int, constants: Constants
) -> tuple[dict[str, Any], bool]:
    from megatron_disagmoe.reproduction import report
    from megatron_disagmoe.reproduction.figures.catalogue import figures
    from megatron_disagmoe.reproduction.lab import Lab

    chosen = figures(name)
    with err_console.status(f"simulating {name}"):
        outcomes = report.reproduce(chosen, Lab(constants, processes))
    written = report.write(chosen, outcomes, out) if out is not None else []
    result = report.as_json(outcomes, written)
    return result, all(row["holds"] for row in result["rows"])


def _more(
    name: str, out: Path | None, processes: int, constants: Constants, studies: str | None, resume: bool
) -> tuple[dict[str, Any], bool]:
    def progress(text: str) -> None:
        err_console.print(text, highlight=False, markup=False)

    if name == "beyond":
        from megatron_disagmoe.reproduction.beyond.study import run

        names = tuple(each.strip() for each in studies.split(",")) if studies else ()
        return run(names, out, processes=processes, progress=progress, resume=resume), True
    if name == "bars":
        from megatron_disagmoe.reproduction.beyond.study import bars

        rows = bars(processes=min(processes, 2))
    elif name == "ceiling":
        from megatron_disagmoe.reproduction.ceiling import ceilings

        rows = [each.as_json() for each in ceilings(constants, processes=processes)]
        return {"rows": rows, "files": _save(name, rows, out)}, True
    elif name == "sensitivity":
        from megatron_disagmoe.reproduction import sensitivity

        found = sensitivity.table(processes=processes, progress=progress)
        rows = [row.as_json() for row in found]
        result = {"rows": rows, "table": sensitivity.markdown(found), "files": _save(name, rows, out)}
        return result, True
    else:
        from megatron_disagmoe.benchmarks.paper_schedules import check
        from megatron_disagmoe.benchmarks.schedule_picture import draw

        with tempfile.TemporaryDirectory(prefix="disagmoe-reproduce-") as scratch:
            rows = check(Path(scratch))
        files = _save(name, rows, out)
        if out is not None:
            draw(rows, out / "executor.png")
            files.append(str(out / "executor.png"))
        return {"rows": rows, "files": files}, all(row["holds"] for row in rows)
    return {"rows": rows, "files": _save(name, rows, out)}, all(row["holds"] for row in rows)


def _save(name: str, rows: list[dict[str, Any]], out: Path | None) -> list[str]:
    if out is None:
        return []
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"rows": rows}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [str(path)]


def show(console: Console, result: dict[str, Any]) -> None:
    """What was found, for people."""
    if "table" in result:
        console.print(result["table"], highlight=False, markup=False, soft_wrap=True)
    elif "predictions" in result:
        _show_figures(console, result)
    else:
        _show_rows(console, result["rows"])
    for path in result["files"]:
        console.print(path, highlight=False)


def _show_figures(console: Console, result: dict[str, Any]) -> None:
    table = Table()
    for name in ("figure", "quantity", "paper", "ours", "error", "tolerance", "holds", "why"):
        table.add_column(name, justify="left" if name in ("figure", "quantity", "why") else "right", overflow="fold")
    for row in result["rows"]:
        verdict = ("yes" if row["holds"] else "no") + (" (fitted)" if row["calibration"] else "")
        table.add_row(
            row["figure"],
            row["quantity"],
            f"{row['paper']:.3g}",
            f"{row['ours']:.3g}",
            f"{row['relative_error']:+.1%}",
            f"{row['tolerance']:.0%}",
            verdict,
            row["why"],
        )
    console.print(table)
    console.print(
        f"{result['held']} of {result['predictions']} predictions hold ({result['share_held']:.0%}); "
        f"{result['calibration_held']} of {result['calibration_rows']} calibration rows are within tolerance",
        highlight=False,
    )


def _show_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table()
    names = [name for name, value in rows[0].items() if not isinstance(value, dict | list)]
    for name in names:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        shown = [row[name] for name in names]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown))
    console.print(table)
