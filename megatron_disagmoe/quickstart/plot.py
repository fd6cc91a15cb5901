"""Loss curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_disagmoe.training_log import TrainingLog

_COLORS = ("#1f6feb", "#d1570a")


def losses(log: TrainingLog) -> dict[int, float]:
    """Iteration -> training loss; skipped steps have none."""
    return {step.iteration: step.loss for step in log.steps if step.loss is not None}


def relative_differences(first: TrainingLog, second: TrainingLog) -> dict[int, float]:
    """Iteration -> |first - second| / second, over the iterations both have."""
    ours, theirs = losses(first), losses(second)
    return {i: abs(ours[i] - theirs[i]) / abs(theirs[i]) for i in sorted(ours.keys() & theirs.keys())}


def draw_losses(logs: Mapping[str, TrainingLog], out: Path) -> None:
    """Draw one curve a log, title -> log; with two, a second panel shows by how much they differ.

    Training loss as a line, validation loss as dots, in nats a byte.
    """
    figure = Figure(figsize=(8, 5 if len(logs) == 1 else 6.5), layout="constrained")
    if len(logs) == 2:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_differences(bottom, *logs.values())
    else:
        top = bottom = figure.subplots()
    for number, (title, log) in enumerate(logs.items()):
        curve = losses(log)
        # the second one dashed and thinner: equal curves must not hide one another
        style = {"linewidth": 2.0} if number == 0 else {"linewidth": 1.2, "linestyle": (0, (4, 2))}
        color = _COLORS[number % len(_COLORS)]
        top.plot(list(curve), list(curve.values()), color=color, label=f"{title}, training", **style)
        during = [v for v in log.validations if v.split is None]
        if during:
            top.plot(
                [v.iteration for v in during],
                [v.loss for v in during],
                color=color,
                linestyle="none",
                marker="o" if number == 0 else "x",
                markersize=7,
                label=f"{title}, validation",
            )
    top.set_ylabel("loss (nats a byte)")
    top.set_title("Quickstart: a small mixture-of-experts GPT on Python's language reference")
    top.grid(alpha=0.3)
    top.legend()
    bottom.set_xlabel("step")
    figure.savefig(out, dpi=130)


def _draw_differences(axes: Axes, first: TrainingLog, second: TrainingLog) -> None:
    differences = {i: d for i, d in relative_differences(first, second).items() if d > 0}
    if differences:
        axes.semilogy(list(differences), list(differences.values()), ".", color="#555555", markersize=4)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "every logged digit is equal", ha="center", va="center", transform=axes.transAxes)
    axes.set_ylabel("relative\ndifference")
    axes.grid(alpha=0.3)
