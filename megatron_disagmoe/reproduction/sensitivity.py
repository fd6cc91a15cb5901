"""What the predictions do across the plausible range of every constant, one at a time, the calibration done again.

On figure 11's cell (DeepSeek-MoE at 8K), where every system is quick to run: AF-pipe's gains and what it exposes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_disagmoe.reproduction.constants import ORIGINS, Constants
from megatron_disagmoe.reproduction.figures.base import gain
from megatron_disagmoe.reproduction.figures.end_to_end import PAPER_SYSTEMS, fig11_cells
from megatron_disagmoe.reproduction.hardware import calibrate
from megatron_disagmoe.reproduction.lab import Lab


@dataclass(frozen=True)
class Outcome:
    """The predictions with one constant at one value. ``attention``, ``ffn``: the fitted factors."""

    constant: str
    value: float
    attention: float
    ffn: float
    gains: dict[str, float]
    exposed: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """For the file of numbers."""
        return {
            "constant": self.constant,
            "value": self.value,
            "attention_factor": self.attention,
            "ffn_factor": self.ffn,
            "gain_over": self.gains,
            "exposed_communication_s": self.exposed,
        }


def outcome(name: str, value: float, constants: Constants, *, processes: int) -> Outcome:
    """One row of the table."""
    lab = Lab(constants, processes)
    cells = {cell.system: cell for cell in fig11_cells() if cell.system in PAPER_SYSTEMS}
    lab.run(list(cells.values()))
    results = {system: lab[cell] for system, cell in cells.items()}
    ours = results["af-pipe"]
    fitted = calibrate(constants)
    return Outcome(
        name,
        value,
        fitted.attention,
        fitted.ffn,
        {system: gain(result, ours) for system, result in results.items() if system != "af-pipe"},
        {system: result.exposed_seconds for system, result in results.items() if result is not None},
    )


def table(
    *, processes: int = 1, progress: Callable[[str], None] | None = None, names: tuple[str, ...] | None = None
) -> list[Outcome]:
    """Every constant at both ends of its range; the first row has all as they are."""
    usual = Constants()
    rows = [outcome("as fixed", 0.0, usual, processes=processes)]
    for name in names or tuple(ORIGINS):
        origin = ORIGINS[name]
        for value in dict.fromkeys((origin.low, origin.high)):
            if value == getattr(usual, name):
                continue
            if progress:
                progress(f"{name} = {value:g}")
            rows.append(outcome(name, value, usual.with_(name, value), processes=processes))
    return rows


def markdown(rows: list[Outcome]) -> str:
    """The table for people."""
    lines = [
        "| constant | value | fitted attention, FFN | over Megatron-1F1B | over Tutel | over Comet | over DualPipe |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gains = " | ".join(f"{row.gains[s]:.2f}" for s in ("megatron-1f1b", "tutel", "comet", "dualpipe"))
        value = f"{row.value:.3g}" if row.value or row.constant != "as fixed" else ""
        lines.append(f"| {row.constant} | {value} | {row.attention:.2f}, {row.ffn:.2f} | {gains} |")
    return "\n".join(lines) + "\n"
