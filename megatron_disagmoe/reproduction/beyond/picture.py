"""The pictures: AF-pipe over the rival and over Megatron, with the lines at which they cross."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from megatron_disagmoe.reproduction.beyond.run import RIVAL, Outcome
from megatron_disagmoe.reproduction.figures.base import LABELS, gain

_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
#: Line and marker by what AF-pipe is compared with.
_STYLES = {RIVAL: "o-", "megatron-1f1b": "s:"}


@dataclass(frozen=True)
class Crossing:
    """AF-pipe and another system change places between two neighbouring points of a study.

    ``at``: where the line between them crosses 1, both gains and a varied number that grows by factors on logarithmic
    scales; None where what is varied is no number.
    """

    series: str
    over: str
    between: tuple[str, str]
    at: float | None

    def as_json(self) -> dict[str, Any]:
        """For files."""
        return asdict(self)


def crossings(outcomes: Sequence[Outcome]) -> list[Crossing]:
    """Every change of places in a study; where either fits nowhere there is nothing to cross."""
    found = []
    for series, over in itertools.product(dict.fromkeys(each.point.series for each in outcomes), _STYLES):
        mine = [(each, _over(each, over)) for each in outcomes if each.point.series == series]
        there = [(each, value) for each, value in mine if value]
        for (before, low), (after, high) in itertools.pairwise(there):
            if (low - 1) * (high - 1) < 0:
                share = math.log(low) / (math.log(low) - math.log(high))
                at = _between(before.point.at, after.point.at, share)
                found.append(Crossing(series, over, (before.point.x, after.point.x), at))
    return found


def _between(low: float | None, high: float | None, share: float) -> float | None:
    if low is None or high is None:
        return None
    if min(low, high) <= 0:
        return low + share * (high - low)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def _over(outcome: Outcome, system: str) -> float:
    return gain(outcome.results[system], outcome.results["af-pipe"])


def draw(studies: dict[str, list[Outcome]], picture: Picture) -> None:
    """A panel a study; a colour a series; crossings as vertical lines."""
    columns = min(3, len(studies))
    rows = -(-len(studies) // columns)
    picture.set_size_inches(4.6 * columns, 3.6 * rows)
    axes = picture.subplots(rows, columns, squeeze=False)
    for number, (study, outcomes) in enumerate(studies.items()):
        _panel(axes[number // columns][number % columns], study, outcomes)
    for empty in range(len(studies), rows * columns):
        axes[empty // columns][empty % columns].axis("off")
    picture.supylabel("AF-pipe's throughput over the other's; above 1 it wins", fontsize=9)


def _panel(axis: Axes, study: str, outcomes: Sequence[Outcome]) -> None:
    labels = list(dict.fromkeys(each.point.x for each in outcomes))
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    if max(map(len, labels)) > 8:
        axis.tick_params(axis="x", labelrotation=25)
    series = list(dict.fromkeys(each.point.series for each in outcomes))
    for number, (colour, name) in enumerate(zip(_COLOURS, series, strict=False)):
        mine = [each for each in outcomes if each.point.series == name]
        for system, style in _STYLES.items():
            values = [(labels.index(each.point.x), _over(each, system)) for each in mine]
            there = [(at, value) for at, value in values if value]
            label = f"{name} over {'the rival' if system == RIVAL else LABELS[system]}"
            axis.plot([at for at, _ in there], [value for _, value in there], style, color=colour, label=label, ms=4)
        _mark_absent(axis, mine, labels, colour, number)
    for crossing in crossings(outcomes):
        place = _place(crossing, outcomes, labels)
        colour = _COLOURS[series.index(crossing.series)]
        axis.axvline(place, color=colour, lw=1, ls="--" if crossing.over == RIVAL else ":")
        if crossing.at is not None:
            axis.annotate(f"{crossing.at:.3g}", (place, 1.0), fontsize=6, color=colour, rotation=90, va="bottom")
    axis.axhline(1.0, color="#000000", lw=0.8)
    axis.set_title(study, fontsize=9)
    axis.legend(fontsize=5)


def _mark_absent(axis: Axes, mine: Sequence[Outcome], labels: Sequence[str], colour: str, number: int) -> None:
    """A triangle at the upper edge where the rival fits nowhere, a cross at the lower one where AF-pipe doesn't."""
    for each in mine:
        at = labels.index(each.point.x) + 0.06 * number
        if each.results["af-pipe"] is None:
            axis.plot([at], [0.02], "x", color=colour, ms=5, transform=axis.get_xaxis_transform())
        elif each.results[RIVAL] is None:
            axis.plot([at], [0.97], "^", color=colour, ms=4, transform=axis.get_xaxis_transform())


def _place(crossing: Crossing, outcomes: Sequence[Outcome], labels: Sequence[str]) -> float:
    """Where on the axis, whose ticks are as far apart as each other."""
    before, after = (labels.index(x) for x in crossing.between)
    low, high = (next(each.point.at for each in outcomes if each.point.x == x) for x in crossing.between)
    if crossing.at is None or low is None or high is None:
        return (before + after) / 2
    if min(low, high) <= 0:
        return before + (after - before) * (crossing.at - low) / (high - low)
    return before + (after - before) * math.log(crossing.at / low) / math.log(high / low)
