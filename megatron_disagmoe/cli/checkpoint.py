"""``disagmoe checkpoint``: compare checkpoints, without a GPU and without Megatron."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from megatron_disagmoe.checkpoints.difference import Difference, compare
from megatron_disagmoe.checkpoints.reading import Checkpoint
from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_SHOWN = 20


@app.callback()
def _checkpoint() -> None:
    """Compare checkpoints."""


@app.command()
def diff(
    first: Path = typer.Argument(metavar="A", help="A --save folder (its last checkpoint), or one iter_... folder."),
    second: Path = typer.Argument(metavar="B", help="The other one."),
    optimizer: bool = typer.Option(False, "--optimizer", help="Compare the optimizer's tensors too."),
    as_json: bool = JsonOption,
) -> None:
    """Compare the weights of two torch_dist checkpoints, however sharded; exit 1 where they differ."""
    with bad_input_exits_2():
        a, b = Checkpoint(first), Checkpoint(second)
        difference = compare(a, b, optimizer=optimizer)
    emit(difference.as_json(), as_json=as_json, render=lambda console: _render(difference, a, b, console))
    if not difference.equal:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def _render(difference: Difference, a: Checkpoint, b: Checkpoint, console: Console) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def lines(title: str, entries: list[str]) -> None:
        if entries:
            line(f"{title}: {len(entries)}")
            for entry in entries[:_SHOWN]:
                line(f"  {entry}")
            if len(entries) > _SHOWN:
                line(f"  ... and {len(entries) - _SHOWN} more (all with --json)")

    line(f"A {a.folder}\nB {b.folder}")
    lines("only in A", difference.missing)
    lines("only in B", difference.unexpected)
    lines("another shape", [f"{key}: {list(x)} and {list(y)}" for key, (x, y) in difference.shapes.items()])
    lines("another type", [f"{key}: {x} and {y}" for key, (x, y) in difference.dtypes.items()])
    worst = sorted(difference.values.items(), key=lambda item: -item[1])
    lines("other values (largest absolute difference)", [f"{key}: {value:.3e}" for key, value in worst])
    verdict = "equal" if difference.equal else f"DIFFERENT, by at most {difference.max_abs_difference:.3e}"
    line(f"{difference.num_compared} tensors compared: {verdict}")
