"""Which published rows no schedule could reach, with the constants as they are fixed.

Every cell is run once more with AF-pipe at the lowest of the lower bounds of all its shapes, with nothing exposed. What
grows with AF-pipe's speed and stays below the paper's figure even then cannot hold, whatever the builders find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_disagmoe.reproduction.constants import Constants
from megatron_disagmoe.reproduction.figures.catalogue import FIGURES
from megatron_disagmoe.reproduction.lab import Lab
from megatron_disagmoe.reproduction.rows import Row

#: By figure, what begins the quantities that can only rise when AF-pipe gets faster (or do not depend on it): gains
#: over baselines, orders that want it to be the fastest. Ratios of two of its own steps and places of an optimum can
#: do either.
_RISING = {
    "fig10": ("",),
    "fig11": ("order",),
    "fig12": ("16K: A:F =",),
    "fig13": ("least gain", "greatest gain"),
    "fig14": ("v at which memory runs out",),
}


@dataclass(frozen=True)
class Ceiling:
    """A row with AF-pipe at its lowest bound; ``rising``: whether no schedule can give more."""

    row: Row
    rising: bool

    @property
    def out_of_reach(self) -> bool:
        """No schedule makes the row hold."""
        return self.rising and self.row.relative_error < -self.row.tolerance - 1e-12

    def as_json(self) -> dict[str, Any]:
        """For tables and files."""
        return {
            "figure": self.row.figure,
            "quantity": self.row.quantity,
            "paper": self.row.paper,
            "at_bound": self.row.ours,
            "can_only_rise": self.rising,
            "out_of_reach": self.out_of_reach,
        }


def ceilings(constants: Constants | None = None, *, processes: int = 1) -> list[Ceiling]:
    """Every predicted row."""
    lab = Lab(constants or Constants(), processes, at_bound=True)
    chosen = [figure for figure in FIGURES.values() if figure.name in _RISING]
    lab.run([cell for figure in chosen for cell in figure.cells()])
    rows = [row for figure in chosen for row in figure.make(lab).rows]
    return [Ceiling(row, is_rising(row)) for row in rows if not row.calibration]


def is_rising(row: Row) -> bool:
    """Whether ``row`` can only rise when AF-pipe gets faster."""
    return row.quantity.startswith(_RISING[row.figure])
