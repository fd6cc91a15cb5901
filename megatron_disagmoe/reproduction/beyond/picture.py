"""The pictures: AF-pipe over the rival and over Megatron, with the line at which they cross."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.figure import Figure as Picture

from megatron_disagmoe.reproduction.beyond.run import Outcome

_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")


def crossings(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Models and neighbouring points of a study between which AF-pipe and the rival change places."""
    found = []
    for model in dict.fromkeys(each.point.model for each in outcomes):
        there = [each for each in outcomes if each.over_rival and each.point.model == model]
        for before, after in itertools.pairwise(there):
            if (before.over_rival - 1) * (after.over_rival - 1) < 0:
                found.append((model, f"between {before.point.x} and {after.point.x}"))
    return found


def draw(studies: dict[str, list[Outcome]], picture: Picture) -> None:
    """A panel a study; a line a model."""
    columns = 3
    rows = -(-len(studies) // columns)
    picture.set_size_inches(4.2 * columns, 3.1 * rows)
    axes = picture.subplots(rows, columns, squeeze=False)
    for number, (study, outcomes) in enumerate(studies.items()):
        axis = axes[number // columns][number % columns]
        models = list(dict.fromkeys(each.point.model for each in outcomes))
        labels = list(dict.fromkeys(each.point.x for each in outcomes))
        axis.set_xticks(range(len(labels)), labels, fontsize=7)
        if max(map(len, labels)) > 8:
            axis.tick_params(axis="x", labelrotation=25)
        for colour, model in zip(_COLOURS, models, strict=False):
            mine = [each for each in outcomes if each.point.model == model]
            for style, label, values in (
                ("o-", f"{model} over the rival", [each.over_rival for each in mine]),
                ("s:", f"{model} over Megatron", [each.over_megatron for each in mine]),
            ):
                at = [labels.index(each.point.x) for each, value in zip(mine, values, strict=True) if value]
                axis.plot(at, [value for value in values if value], style, color=colour, label=label, ms=4)
        axis.axhline(1.0, color="#000000", lw=0.8)
        axis.set_title(study, fontsize=9)
        axis.legend(fontsize=5)
    for empty in range(len(studies), rows * columns):
        axes[empty // columns][empty % columns].axis("off")
    picture.supylabel("AF-pipe's throughput over the other's; above 1 it wins", fontsize=9)
