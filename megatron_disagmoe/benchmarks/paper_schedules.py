"""The event engine beside the real executor, at the paper's ratios of stage times, made small.

Each case takes a model and a length, the calibrated costs of AF-pipe's stages there, and runs them as sleeping stages
in real processes with the real executor and transport (``disagmoe bench schedule``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_disagmoe.benchmarks.schedule import BAR, Case, measure
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.reproduction.constants import Constants
from megatron_disagmoe.reproduction.hardware import calibrate
from megatron_disagmoe.reproduction.published import MODELS
from megatron_disagmoe.reproduction.systems.af_paper import Evaluated, Shape
from megatron_disagmoe.reproduction.systems.choose import Task
from megatron_disagmoe.simulator.costs import StageCosts

_LENGTHS = (4096, 16384)
#: Groups a side, layers and micro-batches of the small ones.
_SIZES = ((1, 4, 8), (2, 8, 8))


def cases() -> list[Case]:
    """Every model at two lengths, on two and on four processes."""
    constants = Constants()
    cluster = calibrate(constants).cluster()
    found = []
    for model, _ in MODELS:
        for length in _LENGTHS:
            task = Task.usual(load_model(model), cluster, length, constants)
            costs = Evaluated(task, Shape(2, 8, 8, 4)).costs
            unit = costs.attention
            small = StageCosts(
                attention=1.0,
                ffn=costs.ffn / unit,
                transfer=(costs.edge(0) + costs.edge(1)) / 2 / unit,
                backward_ratio=costs.backward_ratio,
            )
            for groups, layers, n in _SIZES:
                name = f"{model}-{length // 1024}k-p{groups}"
                found.append(Case(name, "interleaved-1f1b", groups, groups, layers, n, small))
    return found


def check(folder: Path, *, stage_seconds: float = 0.05, repeats: int = 3) -> list[dict[str, Any]]:
    """Measure every case; one row each, with the ratio of measured to simulated.

    A case holds where the two are within 5% of each other, whichever is longer.
    """
    rows = measure(cases(), folder, unit_seconds=stage_seconds, repeats=repeats)
    return [row | {"holds": abs(row["measured_over_simulated"] - 1) <= BAR - 1} for row in rows]
