"""Which transformer layers belong to which stage and group."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_disagmoe.model_layers import LayerLayout, moe_pattern
from megatron_disagmoe.schedules.actions import Placement


@pytest.mark.parametrize(
    "freq, pattern",
    [(1, "MMMMM"), (2, "MDMDM"), (3, "MDDMD"), ([0, 1, 1, 0, 1], "DMMDM"), ([0, 0, 0, 0, 0], "DDDDD")],
)
def test_pattern_is_megatrons(freq: int | list[int], pattern: str) -> None:
    assert moe_pattern(freq, 5) == tuple(letter == "M" for letter in pattern)


def test_a_list_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="lists 2 layers but --num-layers is 3"):
        moe_pattern([0, 1], 3)


# Layers from 1; D belongs to the attention stage that follows, after the last M to the tail.
@pytest.mark.parametrize(
    "pattern, moe_layers, dense_before",
    [
        ("MMM", (1, 2, 3), ((), (), (), ())),
        ("DMM", (2, 3), ((1,), (), ())),
        ("DDMDMD", (3, 5), ((1, 2), (4,), (6,))),
        ("MDD", (1,), ((), (2, 3))),
    ],
)
def test_stages_by_hand(pattern: str, moe_layers: tuple[int, ...], dense_before: tuple[tuple[int, ...], ...]) -> None:
    assert LayerLayout.from_pattern([c == "M" for c in pattern]) == LayerLayout(moe_layers, dense_before)


def test_layers_of_groups_by_hand() -> None:
    layout = LayerLayout.from_pattern([c == "M" for c in "DMMDMD"])  # MoE layers 2, 3, 5
    placement = Placement.round_robin(num_layers=3, num_attention_groups=2, num_ffn_groups=2)  # tail on A1
    assert layout.attention_layers(placement, 0) == (1, 2, 4, 5)
    assert layout.attention_layers(placement, 1) == (3, 6)
    assert layout.ffn_layers(placement, 0) == (2, 5)
    assert layout.ffn_layers(placement, 1) == (3,)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_every_layer_is_held_once(pattern: list[bool], data: st.DataObject) -> None:
    layout = LayerLayout.from_pattern(pattern)
    num_moe = len(layout.moe_layers)
    if not num_moe:
        assert layout.dense_before == (tuple(range(1, len(pattern) + 1)),)
        return
    groups_a, groups_f = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    placement = Placement(
        num_attention_groups=groups_a,
        num_ffn_groups=groups_f,
        attention=tuple(data.draw(st.integers(0, groups_a - 1)) for _ in range(num_moe + 1)),
        ffn=tuple(data.draw(st.integers(0, groups_f - 1)) for _ in range(num_moe)),
    )
    attention = sorted(n for g in range(groups_a) for n in layout.attention_layers(placement, g))
    ffn = sorted(n for g in range(groups_f) for n in layout.ffn_layers(placement, g))
    assert attention == list(range(1, len(pattern) + 1))
    assert ffn == [number for number, is_moe in enumerate(pattern, start=1) if is_moe]
