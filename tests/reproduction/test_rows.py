"""Rows: what counts as holding, and what was listed beforehand."""

from __future__ import annotations

import pytest

from megatron_disagmoe.reproduction.rows import Row, tally
from megatron_disagmoe.reproduction.unreproducible import UNREPRODUCIBLE, reason


@pytest.mark.parametrize("ours, holds", [(1.79, True), (1.62, True), (1.99, False), (1.61, False)])
def test_ratios_hold_within_ten_per_cent(ours: float, holds: bool) -> None:
    row = Row("fig10", "greatest gain over Megatron-1F1B", 1.8, ours)
    assert row.holds is holds
    assert row.relative_error == pytest.approx(ours / 1.8 - 1)


def test_places_and_orders_hold_exactly() -> None:
    assert Row("fig14", "v of the greatest throughput", 16, 16, 0.0).holds
    assert not Row("fig14", "v of the greatest throughput", 16, 8, 0.0).holds


def test_a_listed_row_says_so_only_where_it_fails() -> None:
    listed = UNREPRODUCIBLE[0]
    failed = Row(listed.figure, listed.quantity, 1.92, 1.4)
    assert failed.listed
    assert failed.why == f"listed as unreproducible: {listed.why}"
    assert Row(listed.figure, listed.quantity, 1.92, 1.92, note="ours").why == "ours"
    assert reason("fig10", "greatest gain over Megatron-1F1B") is None


def test_calibration_rows_are_counted_apart() -> None:
    rows = [
        Row("fig6a", "x", 1.0, 1.0, calibration=True),
        Row("fig10", "y", 1.0, 1.05),
        Row("fig10", "z", 1.0, 1.5),
    ]
    counted = tally(rows)
    assert (counted.predictions, counted.held, counted.calibration, counted.share) == (2, 1, 1, 0.5)


def test_json_has_the_promised_keys() -> None:
    keys = set(Row("fig10", "y", 1.0, 1.05).as_json())
    assert {"figure", "quantity", "paper", "ours", "relative_error", "tolerance", "holds", "why"} <= keys
