"""Makespans stay as near to the lower bounds as docs/builders.md says; all cases run in ``disagmoe bench builders``."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_disagmoe.benchmarks.builders import Case, cases, measure, named
from megatron_disagmoe.benchmarks.builders_picture import draw

_QUICK = {
    "balanced": 3,
    "ragged": 2,
    "split": 1,
    "unbalanced": 2,
    "network-bound": 1,
    "few": 5,
    "tail": 2,
    "long tail": 1,
}


def _quick() -> list[Case]:
    """The last few cases of each part: the larger ones."""
    chosen = []
    for part, count in _QUICK.items():
        mine = [case for case in cases() if case.part == part and not case.costs.embedding]
        chosen += mine[-count:]
    return chosen


@pytest.mark.parametrize(
    "case", _quick(), ids=lambda case: f"{case.part}-L{case.placement.num_layers}-n{case.num_micro_batches}"
)
def test_within_the_bar(case: Case) -> None:
    (row,) = measure(iter([case]))
    assert row["safe"]
    assert row["over_bound"] <= case.bar
    assert row["over_bound"] >= 1 - 1e-9


def test_parts_are_named() -> None:
    assert {case.part for case in named("few, split")} == {"few", "split"}
    with pytest.raises(ValueError, match="there is no part 'fast'; choose among balanced"):
        named("fast")


def test_picture(tmp_path: Path) -> None:
    row = {"part": "few", "over_bound": 1.01, "bar": 1.005, "holds": False}
    draw([row, {**row, "over_bound": 1.0, "holds": True}], tmp_path / "builders.png")
    assert (tmp_path / "builders.png").read_bytes().startswith(b"\x89PNG")
