"""Small timelines written by hand."""

from __future__ import annotations

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.simulator.timeline import Span, Timeline

A0, F0 = Group(Side.A, 0), Group(Side.F, 0)


def one_layer() -> Timeline:
    """One layer, one group a side, two micro-batches; A takes 1 and 2, F takes 2 and 3, a transfer 1, the tail 1."""
    forward, backward = Kind.F, Kind.B
    compute: dict[Group, tuple[Span, ...]] = {
        A0: (
            Span(Action(forward, 0, 0), 0, 1),
            Span(Action(forward, 0, 1), 1, 2),
            Span(Action(forward, 1, 0), 5, 6),
            Span(Action(backward, 1, 0), 6, 7),
            Span(Action(forward, 1, 1), 7, 8),
            Span(Action(backward, 1, 1), 8, 9),
            Span(Action(backward, 0, 0), 12, 14),
            Span(Action(backward, 0, 1), 15, 17),
        ),
        F0: (
            Span(Action(forward, 0, 0), 2, 4),
            Span(Action(forward, 0, 1), 4, 6),
            Span(Action(backward, 0, 0), 8, 11),
            Span(Action(backward, 0, 1), 11, 14),
        ),
    }
    transfers: dict[Group, tuple[Span, ...]] = {
        A0: (
            Span(Action(Kind.SEND, 0, 0, Edge.M2N), 1, 2),
            Span(Action(Kind.SEND, 0, 1, Edge.M2N), 2, 3),
            Span(Action(Kind.SEND, 0, 0, Edge.N2M, True), 7, 8),
            Span(Action(Kind.SEND, 0, 1, Edge.N2M, True), 9, 10),
        ),
        F0: (
            Span(Action(Kind.SEND, 0, 0, Edge.N2M), 4, 5),
            Span(Action(Kind.SEND, 0, 1, Edge.N2M), 6, 7),
            Span(Action(Kind.SEND, 0, 0, Edge.M2N, True), 11, 12),
            Span(Action(Kind.SEND, 0, 1, Edge.M2N, True), 14, 15),
        ),
    }
    schedule = Schedule(
        placement=Placement.round_robin(num_layers=1, num_attention_groups=1, num_ffn_groups=1),
        num_micro_batches=2,
        forward_only=False,
        actions={group: tuple(span.action for span in spans) for group, spans in compute.items()},
        parameters={"kind": "by-hand"},
    )
    return Timeline(schedule, compute, transfers, 17.0)


def wide(num_groups: int, num_layers: int, num_micro_batches: int) -> Timeline:
    """Many spans: every group runs its forward stages one after the other, one unit each, and sends what it made."""
    placement = Placement.round_robin(num_layers=num_layers, num_attention_groups=num_groups, num_ffn_groups=num_groups)
    stages: dict[Group, list[int]] = {group: [] for group in placement.groups}
    for layer in range(num_layers):
        stages[placement.attention_group(layer)].append(layer)
        stages[placement.ffn_group(layer)].append(layer)
    compute: dict[Group, tuple[Span, ...]] = {}
    transfers: dict[Group, tuple[Span, ...]] = {}
    for group, layers in stages.items():
        edge = Edge.M2N if group.side is Side.A else Edge.N2M
        work = [(layer, m) for layer in layers for m in range(num_micro_batches)]
        compute[group] = tuple(Span(Action(Kind.F, layer, m), t, t + 1) for t, (layer, m) in enumerate(work))
        transfers[group] = tuple(
            Span(Action(Kind.SEND, layer, m, edge), t + 1, t + 1.5) for t, (layer, m) in enumerate(work)
        )
    actions = {group: tuple(span.action for span in spans) for group, spans in compute.items()}
    schedule = Schedule(placement, num_micro_batches, True, actions, {})
    return Timeline(schedule, compute, transfers, max(map(len, compute.values())) + 0.5)
