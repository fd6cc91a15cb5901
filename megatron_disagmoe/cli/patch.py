"""``disagmoe patch``: our patches in a Megatron-LM checkout, for ``torchrun pretrain_gpt.py`` without our launcher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console

from megatron_disagmoe import patching
from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit

app = typer.Typer(no_args_is_help=True, help="Apply our patches to a Megatron-LM checkout, or take them back.")

CheckoutArgument = typer.Argument(..., metavar="CHECKOUT", help="The folder that holds megatron/.", show_default=False)


@app.command()
def status(checkout: Path = CheckoutArgument, as_json: bool = JsonOption) -> None:
    """Say which version it is and which files are patched."""
    _run(patching.inspect, checkout, as_json)


@app.command()
def check(checkout: Path = CheckoutArgument, as_json: bool = JsonOption) -> None:
    """Say whether apply and revert would work; exit 1 if not. Changes nothing."""
    if _run(patching.inspect, checkout, as_json).errors:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def apply(checkout: Path = CheckoutArgument, as_json: bool = JsonOption) -> None:
    """Apply all patches for its version, or none; doing it again changes nothing. Refuses a dirty tree."""
    _run(patching.apply, checkout, as_json)


@app.command()
def revert(checkout: Path = CheckoutArgument, as_json: bool = JsonOption) -> None:
    """Take them all back, byte for byte."""
    _run(patching.revert, checkout, as_json)


def _run(action: Callable[[Path], patching.Report], checkout: Path, as_json: bool) -> patching.Report:
    with bad_input_exits_2():
        report = action(checkout)
    emit(report.as_json(), as_json=as_json, render=lambda console: _render(report, console))
    return report


def _render(report: patching.Report, console: Console) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"Megatron Core {report.version}: {report.state}")
    for file in report.files:
        written = " (written)" if file.path in report.changed else ""
        line(f"  {file.path}: {file.state}{written}, {', '.join(file.patches)}")
    if report.other_changes and report.state == "patched":
        line(f"  not ours, left alone: uncommitted changes in {', '.join(report.other_changes)}")
    for error in report.errors:
        line(f"  {error}")
