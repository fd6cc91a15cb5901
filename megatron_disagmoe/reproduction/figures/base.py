"""What every figure is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure as Picture

from megatron_disagmoe.reproduction.lab import Cell, Lab
from megatron_disagmoe.reproduction.rows import Row
from megatron_disagmoe.reproduction.systems.result import Result

#: Okabe and Ito's colours, by system.
COLOURS = {
    "megatron-1f1b": "#999999",
    "megatron-overlap": "#56b4e9",
    "tutel": "#e69f00",
    "comet": "#cc79a7",
    "dualpipe": "#0072b2",
    "dualpipe-per-node": "#009e73",
    "af-pipe": "#d55e00",
}
LABELS = {
    "megatron-1f1b": "Megatron-1F1B",
    "megatron-overlap": "Megatron, batch overlap",
    "tutel": "Tutel",
    "comet": "Comet",
    "dualpipe": "DualPipe",
    "dualpipe-per-node": "DualPipe, one copy a node",
    "af-pipe": "AF-pipe",
}


@dataclass(frozen=True)
class Outcome:
    """``rows``, the numbers behind the picture (``data``), and how to draw it."""

    rows: tuple[Row, ...]
    data: Mapping[str, Any]
    draw: Callable[[Picture], None]


@dataclass(frozen=True)
class Figure:
    """One of the paper's figures. ``cells``: what to run for it."""

    name: str
    title: str
    cells: Callable[[], list[Cell]]
    make: Callable[[Lab], Outcome]


def gain(over: Result | None, result: Result | None) -> float:
    """How many times as fast ``result`` is as ``over``, per GPU; 0 where either fits nowhere."""
    if over is None or result is None:
        return 0.0
    return over.seconds_per_token_and_gpu / result.seconds_per_token_and_gpu


def summary(result: Result | None) -> dict[str, Any] | None:
    """For the file of numbers."""
    if result is None:
        return None
    return {
        "step_time_s": result.step_seconds,
        "exposed_communication_s": result.exposed_seconds,
        "bubble_s": result.bubble_seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_gb": result.peak_bytes / 1e9,
        "choice": dict(result.choice),
    }
