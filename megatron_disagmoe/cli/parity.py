"""``disagmoe parity``: train the same steps with AF-pipe and with plain Megatron, and compare."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit, err_console

if TYPE_CHECKING:
    from megatron_disagmoe.parity.cases import Case
    from megatron_disagmoe.parity.compare import Comparison

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def parity(
    attention_groups: int = typer.Option(1, help="p_A."),
    ffn_groups: int | None = typer.Option(None, help="p_F (default: p_A)."),
    attention_ranks: int = typer.Option(1, help="M."),
    ffn_ranks: int = typer.Option(1, help="N."),
    replicas: int = typer.Option(1, help="R."),
    layers: int = typer.Option(4, help="Transformer layers."),
    steps: int = typer.Option(20, help="Optimizer steps."),
    dtype: str = typer.Option("fp32", help="fp32 | bf16 | fp16"),
    schedule: str = typer.Option("interleaved-1f1b", help="--af-schedule"),
    dispatch: str = typer.Option("per-expert", help="--af-dispatch"),
    transport: str = typer.Option("torch", help="--af-transport"),
    start: str = typer.Option("seed", help="seed | checkpoint: where the weights of both runs come from."),
    case: list[str] | None = typer.Option(
        None, "--case", help="Instead of the flags above: a named case, or a group of them; may be repeated."
    ),
    show_cases: bool = typer.Option(False, "--list", help="List the named cases and groups; trains nothing."),
    out: Path | None = typer.Option(None, help="Keep logs and values in this folder."),
    extra: list[str] | None = typer.Argument(None, help="More Megatron flags for both runs, after --."),
    as_json: bool = JsonOption,
) -> None:
    """Losses and gradient norms of AF-pipe beside vanilla Megatron's, from the same weights."""
    from megatron_disagmoe.parity import suite
    from megatron_disagmoe.parity.cases import Case

    with bad_input_exits_2():
        if show_cases:
            _list(as_json=as_json)
            return
        if case:
            named = suite.cases(*case)
        else:
            named = {
                "flags": Case(
                    attention_groups=attention_groups,
                    ffn_groups=ffn_groups,
                    attention_ranks=attention_ranks,
                    ffn_ranks=ffn_ranks,
                    replicas=replicas,
                    layers=layers,
                    steps=steps,
                    dtype=dtype,
                    schedule=schedule,
                    dispatch=dispatch,
                    transport=transport,
                    start=start,
                )
            }
        _run({name: one.with_extra(*(extra or ())) for name, one in named.items()}, out, as_json=as_json)


def _list(*, as_json: bool) -> None:
    from megatron_disagmoe.parity import suite

    groups = {name: list(make()) for name, make in suite.GROUPS.items()}

    def render(console: Console) -> None:
        for group, names in groups.items():
            console.print(f"{group}: {', '.join(names)}", highlight=False)

    emit({"groups": groups}, as_json=as_json, render=render)


def _run(named: dict[str, Case], out: Path | None, *, as_json: bool) -> None:
    from megatron_disagmoe.parity.compare import compare

    with tempfile.TemporaryDirectory(prefix="disagmoe-parity-") as scratch:
        try:
            results = compare(list(named.values()), out or Path(scratch))
        except RuntimeError as error:
            err_console.print(str(error), markup=False, highlight=False)
            raise typer.Exit(EXIT_DOES_NOT_HOLD) from error
    compared = dict(zip(named, results, strict=True))

    def render(console: Console) -> None:
        if len(compared) == 1:
            _print_steps(console, results[0])
        _print_summary(console, compared)

    emit(_as_json(compared), as_json=as_json, render=render)
    if not all(result.holds for result in results):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def _as_json(compared: dict[str, Comparison]) -> dict[str, Any]:
    results = list(compared.values())
    return {
        "max_relative_loss_difference": _finite(max(r.max_relative_loss_difference for r in results)),
        "max_relative_grad_norm_difference": _finite(max(r.max_relative_grad_norm_difference for r in results)),
        "holds": all(result.holds for result in results),
        "cases": {
            name: {
                "holds": result.holds,
                "failures": result.failures(),
                "steps": len(result.af_pipe),
                "max_relative_loss_difference": _finite(result.max_relative_loss_difference),
                "max_relative_grad_norm_difference": _finite(result.max_relative_grad_norm_difference),
                "max_relative_validation_difference": _finite(result.max_relative_validation_difference),
                "vanilla": [_finite(step.loss) for step in result.vanilla],
                "af_pipe": [_finite(step.loss) for step in result.af_pipe],
            }
            for name, result in compared.items()
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _print_steps(console: Console, result: Comparison) -> None:
    table = Table("step", "Megatron lm loss", "AF-pipe lm loss", "Megatron grad norm", "AF-pipe grad norm")
    for vanilla, ours in zip(result.vanilla, result.af_pipe, strict=False):
        values = (vanilla.loss, ours.loss, vanilla.grad_norm, ours.grad_norm)
        table.add_row(str(vanilla.iteration), *("-" if value is None else f"{value:.7f}" for value in values))
    console.print(table)


def _print_summary(console: Console, compared: dict[str, Comparison]) -> None:
    from megatron_disagmoe.parity.compare import TOLERANCES

    table = Table("case", "steps", "loss", "gradient norm", "validation", "", title="largest relative differences")
    for name, result in compared.items():
        table.add_row(
            name,
            str(len(result.af_pipe)),
            f"{result.max_relative_loss_difference:.1e}",
            f"{result.max_relative_grad_norm_difference:.1e}",
            f"{result.max_relative_validation_difference:.1e}",
            "holds" if result.holds else "DOES NOT HOLD",
        )
    console.print(table)
    for name, result in compared.items():
        for failure in result.failures():
            console.print(f"{name}: {failure}", highlight=False)
    allowed = {dtype: TOLERANCES[dtype] for dtype in {result.case.dtype for result in compared.values()}}
    for dtype, (loss, norm) in allowed.items():
        console.print(f"allowed in {dtype}: losses {loss:.0e}, norms {norm:.0e}", highlight=False)
