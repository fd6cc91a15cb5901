"""``disagmoe reproduce``: the paper's figures by simulation, beside its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit, err_console

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def reproduce(
    figure: Annotated[
        str, typer.Argument(help="fig5, fig6a, fig10 to fig14, all; beyond and sensitivity.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for rows, tables and pictures.", show_default=False)] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="At once.", show_default="all cores")] = None,
    as_json: bool = JsonOption,
) -> None:
    """Re-create figures by simulation and compare; exit code 1 where a prediction misses its tolerance."""
    with bad_input_exits_2():
        from megatron_disagmoe.reproduction import report
        from megatron_disagmoe.reproduction.figures.catalogue import figures
        from megatron_disagmoe.reproduction.lab import Lab

        chosen = figures(figure)
        lab = Lab.on_all_cores() if processes is None else Lab(processes=processes)
        with err_console.status(f"simulating {figure}"):
            outcomes = report.reproduce(chosen, lab)
        written = report.write(chosen, outcomes, out) if out is not None else []
        result = report.as_json(outcomes, written)
    emit(result, as_json=as_json, render=lambda console: show(console, result))
    if not all(row["holds"] for row in result["rows"]):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def show(console: Console, result: dict[str, Any]) -> None:
    """The rows as a table, and how many hold."""
    table = Table(show_lines=False)
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
    for path in result["files"]:
        console.print(path, highlight=False)
