"""A roofline of a plan: what each side computes per byte it sends, and what of either limit it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_disagmoe.drawing.palette import STYLES
from megatron_disagmoe.planner.operations import model_flops
from megatron_disagmoe.planner.rerank import Ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Point:
    """One side, per GPU: model FLOPs per byte sent, FLOP/s in the step, and both limits.

    ``at_peak``: FLOP/s of the GPU's data sheet. ``computing``: FLOP/s while it computes, recomputation and
    efficiencies included. ``bytes_per_s``: what one sending port moves of the bytes counted.
    """

    side: str
    intensity: float
    achieved: float
    at_peak: float
    computing: float
    bytes_per_s: float


def points(ranked: Ranked) -> list[Point]:
    """Both sides of a plan."""
    e = ranked.evaluation
    a, problem, n = e.allocation, e.problem, e.num_micro_batches
    tokens = problem.job.tokens_per_step
    flops = model_flops(problem.model, sequence=problem.job.sequence_length)
    layers = problem.num_layers
    found = []
    stages = e.costs.forward_times, e.costs.backward_times
    a_side = (flops.attention_side, a.attention_gpus, problem.attention_pool, e.links.attention_buffers)
    f_side = (flops.ffn_side, a.ffn_gpus, problem.ffn_pool, e.links.ffn_buffers)
    for side, groups, (total, gpus, pool, buffers) in (
        ("attention", a.attention_groups, a_side),
        ("FFN", a.ffn_groups, f_side),
    ):
        per_gpu = 3 * total * tokens / gpus
        first = 0 if side == "attention" else 1
        busy = n / groups * sum(sum(times[first::2]) for times in stages)
        # Each layer's rows leave once in forward and once, as gradients, in backward.
        moved = 2 * n * layers / groups * float(buffers[0])
        port = n * layers / groups * float(e.links.m2n[0] + e.links.n2m[0])
        found.append(
            Point(
                side=side,
                intensity=per_gpu / moved,
                achieved=per_gpu / ranked.step_seconds,
                at_peak=pool.gpu.peak_flops,
                computing=per_gpu / busy,
                bytes_per_s=moved / port,
            )
        )
    return found


def check_picture(out: Path) -> None:
    """Before anything takes long.

    Raises:
        ValueError: for an ending that cannot be drawn.
    """
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--picture {out}: the name must end in .png, .svg or .pdf")


def draw_roofline(ranked: Ranked, out: Path) -> None:
    """Write the picture; its kind follows the file's ending.

    Raises:
        ValueError: for an ending that cannot be drawn.
    """
    check_picture(out)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "disagmoe", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        _draw(figure.subplots(), points(ranked))
        e = ranked.evaluation
        figure.suptitle(
            f"{e.problem.model.name} on {e.problem.cluster.name}, {e.problem.job.sequence_length} tokens: "
            f"{ranked.step_seconds:.4g} s a step"
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)


def _draw(axes: Axes, both: list[Point]) -> None:
    least = min(point.intensity for point in both) / 8
    most = max(max(point.intensity, point.at_peak / point.bytes_per_s) for point in both) * 8
    x = np.geomspace(least, most, 200)
    for point, style in zip(both, ("F", "W"), strict=True):
        colour = STYLES[style].colour
        axes.plot(x, np.minimum(point.computing, x * point.bytes_per_s), color=colour, label=f"{point.side}: reachable")
        axes.plot(x, np.minimum(point.at_peak, x * point.bytes_per_s), color=colour, linestyle=":", linewidth=1)
        axes.plot(point.intensity, point.achieved, "o", color=colour, label=f"{point.side}: in a step")
        axes.annotate(
            f"{point.achieved / 1e12:.3g} TFLOP/s",
            (point.intensity, point.achieved),
            textcoords="offset points",
            xytext=(6, -11),
            color=colour,
        )
    axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="at the data sheet's peak")
    axes.set(xscale="log", yscale="log", xlabel="model FLOPs per byte sent", ylabel="FLOP/s a GPU")
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize=8, loc="lower right")

