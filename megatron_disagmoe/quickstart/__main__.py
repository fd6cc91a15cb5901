"""``python -m megatron_disagmoe.quickstart``, which ``scripts/quickstart.sh`` calls once everything is installed."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_disagmoe.quickstart import plot
from megatron_disagmoe.quickstart.child import Stopped, signals_raise
from megatron_disagmoe.quickstart.jobs import AF_PIPE, VANILLA
from megatron_disagmoe.quickstart.train import Failed, Trained, prepare_data, train


def main(
    compare: Annotated[bool, typer.Option("--compare", help="Also train with plain Megatron; show both.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    out: Annotated[Path, typer.Option(help="Folder for data and results.")] = Path("quickstart-output"),
) -> None:
    """Train a small mixture-of-experts GPT with attention and experts in different processes."""
    console = Console(soft_wrap=True)
    folder = _fresh_folder(out / "runs")
    try:
        with signals_raise():
            _run(compare=compare, steps=steps, out=out, folder=folder, console=console)
    except Failed as failure:
        print(f"\nquickstart: {failure}", file=sys.stderr)
        raise typer.Exit(1) from None
    except Stopped as stopped:
        print(f"\nquickstart: {stopped}; every process it started has ended. Kept: {folder}", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None


def _run(*, compare: bool, steps: int, out: Path, folder: Path, console: Console) -> None:
    data = (out / "data").resolve()
    prepare_data(data, log=folder / "data.txt", console=console)
    jobs = (AF_PIPE, VANILLA) if compare else (AF_PIPE,)
    results = [train(job, steps=steps, data=data, folder=folder / job.name, console=console) for job in jobs]
    picture = folder / "loss.png"
    plot.draw_losses({trained.job.title: trained.log for trained in results}, picture)
    summary = _summary(results)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _point_latest_to(folder, out / "latest")
    _report(summary, picture=picture, console=console)


def _fresh_folder(parent: Path) -> Path:
    """A new folder named by the time; earlier runs stay as they are."""
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        folder = (parent / f"{name}{suffix}").resolve()
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent}/{name}-99 exists")


def _point_latest_to(folder: Path, link: Path) -> None:
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    fresh.symlink_to(os.path.relpath(folder, link.parent.resolve()))
    fresh.replace(link)


def _summary(results: list[Trained]) -> dict[str, Any]:
    """What ``summary.json`` holds and the last lines say; losses in nats a byte."""
    summary: dict[str, Any] = {"jobs": {}}
    for trained in results:
        losses = list(plot.losses(trained.log).values())
        summary["jobs"][trained.job.name] = {
            "title": trained.job.title,
            "processes": trained.job.processes,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "validation_loss": trained.log.validation.loss,
            "seconds": round(trained.seconds, 1),
            "checkpoint": str(trained.checkpoints),
        }
    if len(results) == 2:
        differences = plot.relative_differences(results[0].log, results[1].log)
        step = max(differences, key=lambda i: differences[i])
        summary["largest_relative_difference"] = {"step": step, "value": differences[step]}
    return summary


def _report(summary: dict[str, Any], *, picture: Path, console: Console) -> None:
    table = Table("", "processes", "first loss", "last loss", "validation", "time", box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for job in summary["jobs"].values():
        losses = [f"{job[key]:.4f}" for key in ("first_loss", "last_loss", "validation_loss")]
        table.add_row(job["title"], str(job["processes"]), *losses, f"{job['seconds']:.0f} s")
    console.print(table)
    console.print(
        "Losses in nats a byte, validation after training on further batches; "
        "wall time, with start-up and the checkpoint.",
        highlight=False,
    )
    if difference := summary.get("largest_relative_difference"):
        value, step = difference["value"], difference["step"]
        text = f"{value:.1e}, at step {step}" if value else "0: every logged digit is equal"
        console.print(f"Largest relative difference of the training losses: {text}", highlight=False)
    for job in summary["jobs"].values():
        console.print(f"Checkpoint ({job['title']}): {job['checkpoint']}", highlight=False)
    console.print(f"Loss curve: {picture}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
