"""What a slow neighbour leaves a group to do, in closed form and counted piece by piece."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_disagmoe.simulator.feed_bound import _most

halves = st.integers(0, 60).map(lambda count: count / 2)


@given(st.integers(1, 40), st.integers(-4, 80).map(lambda count: count / 2), halves, halves | st.floats(0.01, 5))
def test_pieces_that_come_one_after_the_other(n: int, span: float, feeder: float, time: float) -> None:
    counted = sum(min(time, max(0.0, span - (k + 1) * feeder)) for k in range(n))
    assert _most(n, span, feeder, time) == pytest.approx(counted)
