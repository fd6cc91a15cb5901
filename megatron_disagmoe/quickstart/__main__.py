"""``python -m megatron_disagmoe.quickstart``, which ``scripts/quickstart.sh`` calls once everything is installed."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
    _report(summary, results, picture=picture, console=console)


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


def _summary(results: list[Trained]) -> dict[str, object]:
    summary: dict[str, object] = {}
    for trained in results:
        losses = list(plot.losses(trained.log).values())
        summary[trained.job.name] = {
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "validation_loss": trained.log.validations[-1].loss,
            "seconds": round(trained.seconds, 1),
            "checkpoint": str(trained.checkpoints),
        }
    if len(results) == 2:
        differences = plot.relative_differences(results[0].log, results[1].log)
        step = max(differences, key=lambda i: differences[i])
        summary["largest_relative_difference"] = {"step": step, "value": differences[step]}
    return summary


def _report(summary: dict[str, object], results: list[Trained], *, picture: Path, console: Console) -> None:
    for trained in results:
        losses = list(plot.losses(trained.log).values())
        console.print(
            f"\n{trained.job.title}: training loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
            f"validation loss {trained.log.validations[-1].loss:.4f} nats a byte, "
            f"{trained.seconds:.0f} s with start-up\n  checkpoint: {trained.checkpoints}",
            highlight=False,
        )
    if "largest_relative_difference" in summary:
        difference = summary["largest_relative_difference"]
        console.print(f"\nLargest relative difference of the training losses: {difference}", highlight=False)
    console.print(f"\nLoss curve: {picture}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
