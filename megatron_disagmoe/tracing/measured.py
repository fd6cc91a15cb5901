"""One measured step as a chart: a row for every rank, what it sent, and where it stood still."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_disagmoe.drawing.chart import Box, Chart, Row, stage_name
from megatron_disagmoe.schedules.actions import Group, Side
from megatron_disagmoe.tracing.chrome import COMPUTE, WAIT
from megatron_disagmoe.tracing.merge import RankTrace, Transfer
from megatron_disagmoe.tracing.recorder import rank_label
from megatron_disagmoe.tracing.report import NANO, Step, WaitSplits, events_in


def chart_of_step(ranks: Sequence[RankTrace], transfers: Sequence[Transfer], step: Step) -> Chart:
    """The chart of ``step``, in seconds from its start."""
    layers = {
        trace.rank: sorted({e.layer for e in events_in(trace, step.windows[trace.rank]) if e.category == COMPUTE})
        for trace in ranks
    }
    num_layers = 1 + max((layer for t in ranks if t.group.side is Side.F for layer in layers[t.rank]), default=-1)
    drawing = _Drawing(ranks, transfers, step, layers, num_layers)
    ordered = sorted(ranks, key=lambda t: (t.group.side.value, t.replica, t.group.index, t.rank))
    attention = [trace for trace in ordered if trace.group.side is Side.A]
    ffn = [trace for trace in ordered if trace.group.side is Side.F]
    rows = [
        *(drawing.compute(trace) for trace in attention),
        *(drawing.sent(trace) for trace in attention + ffn),
        *(drawing.compute(trace) for trace in ffn),
    ]
    return Chart(
        heading=f"Measured: step {step.iteration}",
        rows=tuple(rows),
        makespan=(step.end - step.start) / NANO,
        unit="s",
        makespan_name="step",
    )


class _Drawing:
    """What the rows of one step have in common."""

    def __init__(
        self,
        ranks: Sequence[RankTrace],
        transfers: Sequence[Transfer],
        step: Step,
        layers: dict[int, list[int]],
        num_layers: int,
    ) -> None:
        self._step = step
        self._layers = layers
        self._num_layers = num_layers
        self._splits = WaitSplits(transfers)
        self._groups = {trace.rank: trace.group for trace in ranks}
        self._leaders: dict[Group, int] = {}
        for trace in ranks:
            self._leaders.setdefault(trace.group, trace.rank)
        self._sent: dict[int, list[Transfer]] = {trace.rank: [] for trace in ranks}
        for transfer in transfers:
            start, end = step.windows[transfer.sender]
            if start <= transfer.send.start < end:
                self._sent[transfer.sender].append(transfer)

    def compute(self, trace: RankTrace) -> Row:
        """Compute and waits of one rank."""
        boxes: list[Box] = []
        for event in events_in(trace, self._step.windows[trace.rank]):
            if event.category == COMPUTE:
                what = stage_name(trace.group.side, event.layer, num_layers=self._num_layers)
                shade = self._shade(trace.rank, event.layer)
                boxes.append(self._box(event.start, event.end, event.name, shade, what, event.micro_batch))
            elif event.category == WAIT:
                what = f"for {event.name}({event.layer}) from {self._groups.get(event.peer, '?')} rank {event.peer}"
                turn = self._splits.split(trace.rank, event)
                for start, end, style in ((event.start, turn, "waits"), (turn, event.end, "exposed")):
                    if start < end:
                        boxes.append(self._box(start, end, style, 0.0, what, event.micro_batch))
        return self._row(trace, boxes, is_port=False)

    def sent(self, trace: RankTrace) -> Row:
        """What one rank sent."""
        boxes = []
        for transfer in self._sent[trace.rank]:
            event = transfer.send
            receiver = f"{self._groups[transfer.receiver]} rank {transfer.receiver}"
            what = f"{event.name}({event.layer}) {trace.group} \u2192 {receiver}, {event.num_bytes} bytes"
            leaves = event.layer + (event.name.startswith("d") and trace.group.side is Side.A)
            shade = self._shade(trace.rank, leaves)
            boxes.append(self._box(transfer.start, transfer.end, event.name, shade, what, event.micro_batch))
        return self._row(trace, boxes, is_port=True)

    def _box(self, start: int, end: int, style: str, shade: float, what: str, micro_batch: int) -> Box:
        origin = self._step.start
        return Box((start - origin) / NANO, (end - origin) / NANO, style, shade, what, micro_batch)

    def _shade(self, rank: int, layer: int) -> float:
        layers = self._layers[rank]
        return layers.index(layer) / max(1, len(layers) - 1) if layer in layers else 0.0

    def _row(self, trace: RankTrace, boxes: list[Box], *, is_port: bool) -> Row:
        label = rank_label(trace.rank, str(trace.group), trace.replica)
        return Row(
            label=f"{label} \u2192" if is_port else label,
            side=trace.group.side,
            is_port=is_port,
            boxes=tuple(sorted(boxes, key=lambda box: box.start)),
            leads=self._leaders[trace.group] == trace.rank,
        )
