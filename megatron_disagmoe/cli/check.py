"""``disagmoe check``: what a training command's flags would be told at start; starts nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def check(
    flags: list[str] = typer.Argument(None, metavar="-- FLAGS", help="Flags of pretrain_gpt.py, after --."),
    world_size: int = typer.Option(..., min=1, help="How many processes the job would have."),
    as_json: bool = JsonOption,
) -> None:
    """Check a training command's flags with Megatron's own parser; exit 1 where training would refuse them."""
    with bad_input_exits_2(), _quiet():
        from megatron_disagmoe.dry_run import check_flags

        verdict = check_flags(flags or [], world_size)

    def render(console: Console) -> None:
        for error in verdict.errors:
            console.print(error, markup=False, highlight=False, soft_wrap=True)
        if verdict.ranks:
            table = Table("rank", "group", "replica", "index", "layers", box=None)
            for plan in verdict.ranks:
                layers = ", ".join(map(str, plan.layers))
                table.add_row(str(plan.rank), plan.group, str(plan.replica), str(plan.index), layers)
            console.print(table)
        if not verdict.errors:
            processes = "1 process" if world_size == 1 else f"{world_size} processes"
            console.print(f"{processes} can train with these flags", highlight=False)

    emit(
        {
            "ok": not verdict.errors,
            "errors": list(verdict.errors),
            "world_size": world_size,
            "ranks": [asdict(plan) for plan in verdict.ranks],
        },
        as_json=as_json,
        render=render,
    )
    if verdict.errors:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron prints its 800 arguments, and warns of packages that it could use."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
