"""``disagmoe parity``: train the same steps with AF-pipe and with plain Megatron, and compare."""

from __future__ import annotations

import math
import shlex
import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit, err_console

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
    dtype: str = typer.Option("fp32", help="fp32 | bf16"),
    schedule: str = typer.Option("interleaved-1f1b", help="--af-schedule"),
    af_flags: str = typer.Option("", help="More flags for the AF-pipe run alone, in one string."),
    out: Path | None = typer.Option(None, help="Keep the logs in this folder."),
    extra: list[str] | None = typer.Argument(None, help="More Megatron flags for both runs, after --."),
    as_json: bool = JsonOption,
) -> None:
    """Losses and gradient norms of AF-pipe beside vanilla Megatron's, from the same seed."""
    from megatron_disagmoe.parity.cases import Case

    with bad_input_exits_2():
        case = Case(
            attention_groups=attention_groups,
            ffn_groups=ffn_groups,
            attention_ranks=attention_ranks,
            ffn_ranks=ffn_ranks,
            replicas=replicas,
            layers=layers,
            steps=steps,
            dtype=dtype,
            schedule=schedule,
            extra=tuple(extra or ()),
            af_extra=tuple(shlex.split(af_flags)),
        )
        _run(case, out, as_json=as_json)


def _run(case, out: Path | None, *, as_json: bool) -> None:  # type: ignore[no-untyped-def]
    from megatron_disagmoe.parity.compare import TOLERANCES, compare

    with tempfile.TemporaryDirectory(prefix="disagmoe-parity-") as scratch:
        folder = out or Path(scratch)
        try:
            (result,) = compare([case], folder)
        except RuntimeError as error:
            err_console.print(str(error), markup=False, highlight=False)
            raise typer.Exit(EXIT_DOES_NOT_HOLD) from error

    loss, grad_norm = result.max_relative_loss_difference, result.max_relative_grad_norm_difference

    def render(console: Console) -> None:
        table = Table("step", "Megatron lm loss", "AF-pipe lm loss", "Megatron grad norm", "AF-pipe grad norm")
        for vanilla, ours in zip(result.vanilla, result.af_pipe, strict=False):
            table.add_row(
                str(vanilla.iteration), *(f"{value:.7f}" if value is not None else "-" for value in
                (vanilla.loss, ours.loss, vanilla.grad_norm, ours.grad_norm))
            )
        console.print(table)
        allowed = TOLERANCES[case.dtype]
        console.print(
            f"largest relative difference: loss {loss:.2e} (allowed {allowed[0]:.0e}), "
            f"gradient norm {grad_norm:.2e} (allowed {allowed[1]:.0e}): {'holds' if result.holds else 'DOES NOT HOLD'}"
        )

    emit(
        {
            "max_relative_loss_difference": loss if math.isfinite(loss) else None,
            "max_relative_grad_norm_difference": grad_norm if math.isfinite(grad_norm) else None,
            "holds": result.holds,
            "steps": len(result.af_pipe),
            "vanilla": [step.loss for step in result.vanilla],
            "af_pipe": [step.loss for step in result.af_pipe],
        },
        as_json=as_json,
        render=render,
    )
    if not result.holds:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)
