"""Fewer layers where the tail is: who holds what, and what it saves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.builders.placement import balanced_placement, busiest_attention, placed, to_text
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.verifier import verify
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate


def test_by_hand() -> None:
    """Two groups, six layers, a tail as heavy as two: 2 + 2 on the tail's group, 4 on the other."""
    placement = balanced_placement(6, 2, 2, StageCosts(attention=1, ffn=1, transfer=0.5, tail=2))
    assert placement.attention == (0, 1, 0, 1, 1, 1, 0)
    assert placement.ffn == (0, 1, 0, 1, 0, 1)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 12), st.floats(0, 10), st.floats(0, 5))
def test_no_busier_than_round_robin(p: int, q: int, more: int, tail: float, embedding: float) -> None:
    layers = max(p, q) + more
    costs = StageCosts(attention=1, ffn=1, transfer=0.5, tail=tail, embedding=embedding)
    placement = balanced_placement(layers, p, q, costs)
    assert set(placement.attention[:-1]) == set(range(p))
    plain = Placement.round_robin(num_layers=layers, num_attention_groups=p, num_ffn_groups=q)
    assert busiest_attention(placement, costs) <= busiest_attention(plain, costs) * (1 + 1e-9)


def test_without_a_tail_it_is_round_robin() -> None:
    costs = StageCosts(attention=1, ffn=1, transfer=0.5)
    assert balanced_placement(8, 2, 4, costs) == Placement.round_robin(
        num_layers=8, num_attention_groups=2, num_ffn_groups=4
    )
    with pytest.raises(ValueError, match="every group needs a layer"):
        balanced_placement(2, 3, 1, costs)


def test_ways_to_place() -> None:
    def stages(way: str) -> Placement:
        costs = StageCosts(attention=1, ffn=1, transfer=0.5, tail=2)
        return placed(way, num_layers=6, num_attention_groups=2, num_ffn_groups=3, costs=costs)

    assert stages("in-turn") == Placement.round_robin(num_layers=6, num_attention_groups=2, num_ffn_groups=3)
    assert stages("balanced").attention == (0, 1, 0, 1, 1, 1, 0)
    assert stages("0,1,0,1,1,1,0") == stages("(0,1)*2,1,1,0") == stages("balanced")
    assert stages("(0)*6, 1 / (2,1,0)*2") == Placement(2, 3, (0, 0, 0, 0, 0, 0, 1), (2, 1, 0, 2, 1, 0))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_text_reads_back(p: int, q: int, data: st.DataObject) -> None:
    layers = data.draw(st.integers(max(p, q), 9))
    attention = data.draw(st.lists(st.integers(0, p - 1), min_size=layers + 1, max_size=layers + 1))
    ffn = data.draw(st.lists(st.integers(0, q - 1), min_size=layers, max_size=layers))
    placement = Placement(p, q, tuple(attention), tuple(ffn))
    sizes = {"num_layers": layers, "num_attention_groups": p, "num_ffn_groups": q}
    assert placed(to_text(placement), **sizes, costs=builders.NOMINAL_COSTS) == placement


@pytest.mark.parametrize(
    "way, message",
    [
        ("evenly", r"'evenly' is no list of groups: name in-turn or balanced, or write"),
        ("0,,1", r"'0,,1' is no list of groups"),
        ("(0,1)*", r"'\(0,1\)\*' is no list"),
        ("0,1,0", r"'0,1,0' places 3 attention stages, but 4 MoE layers have 5, the tail .* included"),
        ("0,1,0,1,0/0,1", r"places 2 FFN stages, but there are 4 MoE layers: list as many"),
        ("0,1,0,2,0", r"attention group 2 does not exist: there are 2"),
    ],
)
def test_what_is_no_placement(way: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        placed(way, num_layers=4, num_attention_groups=2, num_ffn_groups=2, costs=builders.NOMINAL_COSTS)


def test_a_long_tail_costs_less() -> None:
    """An output layer as heavy as six attention stages."""
    costs = StageCosts(attention=1, ffn=1, transfer=0.5, tail=6)
    steps = []
    for placement in (
        Placement.round_robin(num_layers=16, num_attention_groups=2, num_ffn_groups=2),
        balanced_placement(16, 2, 2, costs),
    ):
        schedule = builders.build("interleaved-1f1b", placement, num_micro_batches=8, costs=costs)
        assert verify(schedule).ok
        steps.append(simulate(schedule, costs).makespan)
    assert steps[1] < 0.9 * steps[0]
