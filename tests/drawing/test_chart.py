from __future__ import annotations

import pytest

from megatron_disagmoe.drawing.chart import Box, chart_of, format_time, shades
from megatron_disagmoe.drawing.palette import STYLES, luminance, rgb, shaded, text_on
from megatron_disagmoe.schedules.actions import Placement, Side
from tests.drawing.timelines import one_layer, wide


def test_rows_are_attention_then_ports_then_ffn() -> None:
    chart = chart_of(wide(2, 4, 3))
    assert [(row.label, row.is_port) for row in chart.rows] == [
        ("A0", False),
        ("A1", False),
        ("A0 →", True),
        ("A1 →", True),
        ("F0 →", True),
        ("F1 →", True),
        ("F0", False),
        ("F1", False),
    ]
    gaps = [chart.rows[i].starts_block(chart.rows[i - 1]) for i in range(1, 8)]
    assert gaps == [False, True, False, False, False, True, False]


def test_boxes_carry_what_hovering_shows() -> None:
    chart = chart_of(one_layer())
    attention, attention_port, ffn_port, ffn = chart.rows
    assert attention.boxes[0] == Box(0, 1, "F", 0.0, "A(0)", 0)
    assert attention.boxes[3] == Box(6, 7, "B", 1.0, "A(1) tail", 0)
    assert attention_port.boxes[0] == Box(1, 2, "M2N", 0.0, "M2N(0) A0 → F0", 0)
    # the gradient of N2M(0) leaves A(1), the second stage of its group
    assert attention_port.boxes[2] == Box(7, 8, "dN2M", 1.0, "dN2M(0) A0 → F0", 0)
    assert ffn_port.boxes[3] == Box(14, 15, "dM2N", 0.0, "dM2N(0) F0 → A0", 1)
    assert [box.micro_batch for box in ffn.boxes] == [0, 1, 0, 1]
    assert (attention.busy(), ffn.busy()) == (10, 10)
    assert chart.styles == {"F", "B", "M2N", "dM2N", "N2M", "dN2M"}


def test_heading_and_facts() -> None:
    chart = chart_of(one_layer(), bounds={"fill_bound": 16.0, "busy_bound": 10.0})
    assert chart.heading == "by-hand: 1 attention and 1 FFN group, 1 layer, 2 micro-batches"
    assert chart.facts == "makespan 17, fill bound 16 (×1.062), busy bound 10 (×1.700)"
    assert chart_of(one_layer(), heading="Predicted", unit="s").facts == "makespan 17 s"
    assert ", forward only:" in chart_of(wide(1, 1, 1)).heading


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (12.5, "", "12.5"),
        (1.25, "s", "1.25 s"),
        (0.0125, "s", "12.5 ms"),
        (0.0000321, "s", "32.1 µs"),
        (0.0, "s", "0 µs"),
    ],
)
def test_times_read_well(value: float, unit: str, text: str) -> None:
    assert format_time(value, unit) == text


def test_shade_is_the_position_in_the_group() -> None:
    placement = Placement.round_robin(num_layers=5, num_attention_groups=2, num_ffn_groups=5)
    shade = shades(placement)
    # A0 holds A(0) A(2) A(4), A1 holds A(1) A(3) and the tail A(5); every FFN group holds one
    assert [shade[Side.A, layer] for layer in range(6)] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert {shade[Side.F, layer] for layer in range(5)} == {0.0}


def test_later_stages_are_lighter_and_text_stays_readable() -> None:
    for name in STYLES:
        assert shaded(name, 0.0) == rgb(STYLES[name].colour)
        if name != "exposed":
            assert luminance(shaded(name, 0.5)) > luminance(shaded(name, 0.0))
        for step in range(11):
            colour = shaded(name, step / 10)
            bright, dark = sorted((luminance(colour), luminance(rgb(text_on(colour)))), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1, level AA


def _seen_by(colour: str, kind: str) -> tuple[float, float, float]:
    """Linear RGB of ``colour`` as a dichromat sees it: Vienot, Brettel and Mollon, 1999, table 2 composed."""
    matrix = {
        "protan": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
        "deutan": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
    }[kind]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb(colour)]
    red, green, blue = (sum(w * c for w, c in zip(row, linear, strict=True)) for row in matrix)
    return red, green, blue


@pytest.mark.parametrize("kind", ["protan", "deutan"])
@pytest.mark.parametrize("styles", [("F", "B"), ("F", "I", "W"), ("M2N", "N2M", "LANE")])
def test_colours_differ_for_dichromats(styles: tuple[str, ...], kind: str) -> None:
    seen = [_seen_by(STYLES[name].colour, kind) for name in styles]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.12
