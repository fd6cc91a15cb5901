"""One published quantity beside ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_disagmoe.reproduction.constants import RATIO_TOLERANCE
from megatron_disagmoe.reproduction.unreproducible import reason


@dataclass(frozen=True)
class Row:
    """``paper``, ``ours``: ratios, reductions as fractions, places of an optimum, or 1 for "yes, in that order".

    ``tolerance``: greatest relative error; 0 where both must be equal. ``calibration``: used to fit, so no prediction.
    ``note``: what else the figure says of it.
    """

    figure: str
    quantity: str
    paper: float
    ours: float
    tolerance: float = RATIO_TOLERANCE
    calibration: bool = False
    note: str = ""

    @property
    def relative_error(self) -> float:
        """(ours - paper) / paper."""
        return (self.ours - self.paper) / self.paper

    @property
    def holds(self) -> bool:
        """Whether ours is within the tolerance."""
        return abs(self.relative_error) <= self.tolerance + 1e-12

    @property
    def listed(self) -> bool:
        """Whether the row was held to be unreproducible before anything was simulated."""
        return reason(self.figure, self.quantity) is not None

    @property
    def why(self) -> str:
        """Why it does not hold, or what to know where it does."""
        listed = reason(self.figure, self.quantity)
        if not self.holds and listed:
            return f"listed as unreproducible: {listed}"
        return self.note

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the file of rows."""
        return {
            "figure": self.figure,
            "quantity": self.quantity,
            "paper": self.paper,
            "ours": self.ours,
            "relative_error": self.relative_error,
            "tolerance": self.tolerance,
            "holds": self.holds,
            "why": self.why,
            "calibration": self.calibration,
            "listed_as_unreproducible": self.listed,
        }


@dataclass(frozen=True)
class Tally:
    """How many rows hold."""

    predictions: int
    held: int
    calibration: int
    calibration_held: int

    @property
    def share(self) -> float:
        """Of the predictions, those that hold; 0 where there are none."""
        return self.held / self.predictions if self.predictions else 0.0


def tally(rows: Iterable[Row]) -> Tally:
    """Count predictions and calibration rows apart."""
    rows = list(rows)
    predicted = [row for row in rows if not row.calibration]
    fitted = [row for row in rows if row.calibration]
    return Tally(
        len(predicted), sum(row.holds for row in predicted), len(fitted), sum(row.holds for row in fitted)
    )
