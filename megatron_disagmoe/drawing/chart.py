"""What all drawings show: rows of boxes with a heading. A ``Timeline`` or a measured trace becomes a ``Chart`` once.

Rows from top to bottom: attention groups, the ports of attention groups (what each sends), the ports of
FFN groups, FFN groups. So tokens go down through the first ports and come back up through the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_disagmoe.schedules.actions import Action, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.simulator.timeline import Span, Timeline


class Box(NamedTuple):
    """One coloured rectangle. Times in the chart's unit."""

    start: float
    end: float
    style: str
    """Key of ``palette.STYLES``."""
    shade: float
    """Position of the stage in its group: 0 the first, 1 the last."""
    what: str
    """What it is, for hovering: ``A(3)``, ``M2N(3) A1 -> F1``."""
    micro_batch: int


@dataclass(frozen=True)
class Row:
    """One group's or one rank's compute, or what it sends."""

    label: str
    side: Side
    is_port: bool
    boxes: tuple[Box, ...]
    """In order of start."""
    leads: bool = True
    """False for the further ranks of a group: the line that follows a micro-batch skips them."""

    def busy(self) -> float:
        """Time covered by boxes, those that show waiting left out."""
        return sum(box.end - box.start for box in self.boxes if box.style not in ("waits", "exposed"))

    def starts_block(self, above: Row) -> bool:
        """Whether a wider gap belongs between this row and the one above it."""
        return self.is_port != above.is_port or (not self.is_port and self.side is not above.side)


@dataclass(frozen=True)
class Chart:
    """A heading, rows, and the length of the time axis."""

    heading: str
    rows: tuple[Row, ...]
    makespan: float
    unit: str = ""
    """``s`` for measured and modelled times; empty where costs are in stage times."""
    bounds: dict[str, float] = field(default_factory=dict)
    """Lower bounds by name, in the chart's unit."""
    makespan_name: str = "makespan"

    @property
    def facts(self) -> str:
        """Makespan and bounds as one line: ``makespan 25, fill bound 24.5 (x1.020)``."""
        facts = [f"{self.makespan_name} {format_time(self.makespan, self.unit)}"]
        for name, bound in self.bounds.items():
            ratio = f" (\u00d7{self.makespan / bound:.3f})" if bound > 0 else ""
            facts.append(f"{name.replace('_', ' ')} {format_time(bound, self.unit)}{ratio}")
        return ", ".join(facts)

    @property
    def styles(self) -> frozenset[str]:
        """Styles in use, for a legend."""
        return frozenset(box.style for row in self.rows for box in row.boxes)


def format_time(value: float, unit: str) -> str:
    """``value`` for people: seconds become ms or us where that reads better; stage times stay as they are."""
    if unit == "s":
        for factor, name in ((1.0, "s"), (1e3, "ms"), (1e6, "\u00b5s")):
            if abs(value) * factor >= 1 or name == "\u00b5s":
                return f"{value * factor:.4g} {name}"
    return f"{value:.6g} {unit}".rstrip()


def shades(placement: Placement) -> dict[tuple[Side, int], float]:
    """For every stage ``(side, layer)`` its position among the stages of its group, from 0 (first) to 1 (last)."""
    result: dict[tuple[Side, int], float] = {}
    for side, held_by in ((Side.A, placement.attention), (Side.F, placement.ffn)):
        stages: dict[int, list[int]] = {}
        for layer, group in enumerate(held_by):
            stages.setdefault(group, []).append(layer)
        for layers in stages.values():
            for position, layer in enumerate(layers):
                result[side, layer] = position / max(1, len(layers) - 1)
    return result


def stage_name(side: Side, layer: int, *, num_layers: int) -> str:
    """``A(3)``, ``F(3)``, and ``A(8) tail`` for the stage that holds the loss."""
    return f"{side.value}({layer}){' tail' if side is Side.A and layer == num_layers else ''}"


def heading_of(schedule: Schedule) -> str:
    """Name and sizes of a schedule."""
    placement = schedule.placement
    name = str(schedule.parameters.get("kind", "schedule"))
    return (
        f"{name}{', forward only' if schedule.forward_only else ''}: "
        f"{placement.num_attention_groups} attention and {_count(placement.num_ffn_groups, 'FFN group')}, "
        f"{_count(placement.num_layers, 'layer')}, {_count(schedule.num_micro_batches, 'micro-batch', 'es')}"
    )


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def chart_of(
    timeline: Timeline, *, heading: str | None = None, bounds: Mapping[str, float] | None = None, unit: str = ""
) -> Chart:
    """The chart of a timeline.

    Args:
        timeline: simulated, or measured with one rank standing for each group.
        heading: replaces the schedule's name and sizes.
        bounds: lower bounds by name (``fill_bound``, ``busy_bound``), in the timeline's unit.
        unit: ``s`` where times are seconds, empty for stage times.
    """
    placement = timeline.schedule.placement
    shade = shades(placement)
    attention = [group for group in placement.groups if group.side is Side.A]
    ffn = [group for group in placement.groups if group.side is Side.F]
    rows = [Row(str(group), group.side, False, _compute(group, timeline, shade)) for group in attention]
    rows += [Row(f"{group} \u2192", group.side, True, _sent(group, timeline, shade)) for group in attention + ffn]
    rows += [Row(str(group), group.side, False, _compute(group, timeline, shade)) for group in ffn]
    return Chart(
        heading=heading_of(timeline.schedule) if heading is None else heading,
        rows=tuple(rows),
        makespan=timeline.makespan,
        unit=unit,
        bounds=dict(bounds or {}),
    )


def _compute(group: Group, timeline: Timeline, shade: dict[tuple[Side, int], float]) -> tuple[Box, ...]:
    num_layers = timeline.schedule.placement.num_layers
    return _in_order(
        Box(
            span.start,
            span.end,
            span.action.kind.value,
            shade[group.side, span.action.layer],
            stage_name(group.side, span.action.layer, num_layers=num_layers),
            span.action.micro_batch,
        )
        for span in timeline.compute.get(group, ())
        if span.action.kind is not Kind.D  # takes no time; the transfer it starts is drawn
    )


def _sent(group: Group, timeline: Timeline, shade: dict[tuple[Side, int], float]) -> tuple[Box, ...]:
    placement = timeline.schedule.placement

    def box(span: Span) -> Box:
        style, what = transfer_name(span.action, placement)
        # a transfer has the shade of the stage it leaves
        layer = span.action.layer + (span.action.gradient and group.side is Side.A)
        return Box(span.start, span.end, style, shade[group.side, layer], what, span.action.micro_batch)

    return _in_order(box(span) for span in timeline.transfers.get(group, ()))


def transfer_name(action: Action, placement: Placement) -> tuple[str, str]:
    """Style and text of a transfer: ``("dM2N", "dM2N(3) F1 -> A1")``."""
    assert action.edge is not None, "only transfers are sent"
    style = f"{'d' if action.gradient else ''}{action.edge.value}"
    sender, receiver = placement.ends(action.edge, action.layer, gradient=action.gradient)
    return style, f"{style}({action.layer}) {sender} \u2192 {receiver}"


def _in_order(boxes: Iterable[Box]) -> tuple[Box, ...]:
    return tuple(sorted(boxes, key=lambda box: box.start))
