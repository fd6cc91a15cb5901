"""``disagmoe bench tracing``: what ``--af-trace-dir`` costs, step against step in one run.

The recorder is switched off in every other training step, on all ranks alike. Whatever else runs on the machine then
weighs on both kinds of steps; the figure is the median, over pairs of neighbouring steps, of the one over the other.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_disagmoe.benchmarks.tracing_job import ENVIRONMENT, WARM_UP_STEPS
from megatron_disagmoe.files import shipped_folder
from megatron_disagmoe.local_job import Job, run
from megatron_disagmoe.quickstart.jobs import AF_PIPE, read_flags

#: A step with traces may take this much longer, as a share of one without.
BAR = 0.02
#: Warm-up steps come on top.
STEPS = 120
_RESAMPLES, _SEED = 2000, 1


def measure(folder: Path, *, steps: int = STEPS) -> list[dict[str, Any]]:
    """One row for each rank of the quickstart's model on four ranks; the traces are left in ``folder/traces``.

    Raises:
        ValueError: for fewer than 2 steps.
        RuntimeError: where the run fails.
    """
    if steps < 2:
        raise ValueError(f"{steps} steps: one with traces and one without are needed at least")
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "switched.py"
    script.write_text("from megatron_disagmoe.benchmarks import tracing_job\n\ntracing_job.main()\n")
    iterations = str(steps + WARM_UP_STEPS)
    flags = [
        *read_flags(shipped_folder("configs") / "runs" / "quickstart.flags"),
        *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255"),
        *("--train-iters", iterations, "--lr-decay-iters", iterations, "--eval-interval", "1000000"),
        *AF_PIPE.flags,
        *("--af-trace-dir", str(folder / "traces")),
    ]
    environment = {ENVIRONMENT: str(folder / "steps"), "OMP_NUM_THREADS": "1"}
    job = Job("tracing", AF_PIPE.processes, flags, str(script), timeout_seconds=500, environment=environment)
    for result in run([job], folder / "jobs"):
        result.checked()
    return [_row(json.loads(path.read_text())) for path in sorted((folder / "steps").glob("rank*.json"))]


def _row(found: dict[str, Any]) -> dict[str, Any]:
    steps = found["steps"]
    row: dict[str, Any] = {"group": found["group"], "steps": len(steps)}
    for name in ("wall", "processor"):
        traced = [step[name] for step in steps if step["traced"]]
        plain = [step[name] for step in steps if not step["traced"]]
        ratios = pair_ratios(steps, name)
        low, high = interval(ratios)
        row |= {
            f"{name}_ms_traced": statistics.median(traced) * 1e3,
            f"{name}_ms_plain": statistics.median(plain) * 1e3,
            f"{name}_overhead": statistics.median(ratios) - 1,
            f"{name}_overhead_low": low - 1,
            f"{name}_overhead_high": high - 1,
        }
    return {**row, "holds": row["wall_overhead"] <= BAR}


def pair_ratios(steps: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Traced over plain for steps 0 and 1, 2 and 3, and so on; which of the two comes first does not matter."""
    ratios = []
    for one, other in zip(steps[::2], steps[1::2], strict=False):
        traced, plain = (one, other) if one["traced"] else (other, one)
        ratios.append(traced[name] / plain[name])
    return ratios


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of ``values`` lies with 95 %: bootstrap, the same every time."""
    draw = random.Random(_SEED)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return medians[round(0.025 * _RESAMPLES)], medians[round(0.975 * _RESAMPLES) - 1]
