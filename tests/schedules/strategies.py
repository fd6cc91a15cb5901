"""Hypothesis strategies for schedules: arbitrary ones, and ones that can run."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

from hypothesis import strategies as st

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.schedules.lowering import add_communication, lowered

_COMPUTE = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.D)
_numbers = st.integers(0, 10**6)


@st.composite
def placements(draw: st.DrawFn, *, max_groups: int = 3, max_layers: int = 5) -> Placement:
    """Any placement that holds together, round-robin or not."""
    num_attention, num_ffn = draw(st.integers(1, max_groups)), draw(st.integers(1, max_groups))
    layers = draw(st.integers(1, max_layers))
    attention = draw(st.lists(st.integers(0, num_attention - 1), min_size=layers + 1, max_size=layers + 1))
    ffn = draw(st.lists(st.integers(0, num_ffn - 1), min_size=layers, max_size=layers))
    return Placement(num_attention, num_ffn, tuple(attention), tuple(ffn))


computes = st.builds(Action, st.sampled_from(_COMPUTE), _numbers, _numbers, st.none(), st.just(False))
transfers = st.builds(
    Action, st.sampled_from((Kind.SEND, Kind.RECV)), _numbers, _numbers, st.sampled_from(Edge), st.booleans()
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
parameter_names = st.from_regex(r"\S+", fullmatch=True)


@st.composite
def any_schedules(draw: st.DrawFn) -> Schedule:
    """Schedules whose actions need not make sense."""
    placement = draw(placements())
    groups = draw(st.lists(st.sampled_from(placement.groups), unique=True))
    return Schedule(
        placement=placement,
        num_micro_batches=draw(st.integers(1, 10**6)),
        forward_only=draw(st.booleans()),
        actions={group: tuple(draw(st.lists(computes | transfers, max_size=8))) for group in groups},
        parameters=draw(st.dictionaries(parameter_names, json_values, max_size=3)),
        ports_in_order=draw(st.booleans()),
    )


@st.composite
def runnable_computes(draw: st.DrawFn) -> Schedule:
    """Compute-only schedules in any order that could run: a random walk over what is ready.

    Backward is split at some stages and not at others; some FFN stages are dispatched again.
    """
    placement = draw(placements())
    micro_batches, forward_only = draw(st.integers(1, 4)), draw(st.booleans())
    again_share, split_share = draw(st.sampled_from((0.0, 0.5, 1.0))), draw(st.sampled_from((0.0, 0.5, 1.0)))
    rng = random.Random(draw(st.integers(0, 2**32)))
    layers = placement.num_layers
    lists: dict[Group, list[Action]] = {group: [] for group in placement.groups}
    ready: list[tuple[Group, Action]] = []

    def offer(side: Side, kind: Kind, layer: int, micro_batch: int) -> None:
        group = placement.attention_group(layer) if side is Side.A else placement.ffn_group(layer)
        ready.append((group, Action(kind, layer, micro_batch)))

    def offer_backward(side: Side, layer: int, micro_batch: int) -> None:
        offer(side, Kind.I if rng.random() < split_share else Kind.B, layer, micro_batch)

    for micro_batch in range(micro_batches):
        offer(Side.A, Kind.F, 0, micro_batch)
    while ready:
        group, action = ready.pop(rng.randrange(len(ready)))
        lists[group].append(action)
        kind, layer, micro_batch = action.kind, action.layer, action.micro_batch
        if kind is Kind.F:
            if group.side is Side.F:
                offer(Side.A, Kind.F, layer + 1, micro_batch)
            elif layer < layers:
                offer(Side.F, Kind.F, layer, micro_batch)
            elif not forward_only:
                offer_backward(Side.A, layer, micro_batch)
        elif kind in (Kind.B, Kind.I):
            if kind is Kind.I:
                offer(group.side, Kind.W, layer, micro_batch)
            if group.side is Side.F:
                offer_backward(Side.A, layer, micro_batch)
            elif layer > 0 and rng.random() < again_share:
                offer(Side.A, Kind.D, layer - 1, micro_batch)
            elif layer > 0:
                offer_backward(Side.F, layer - 1, micro_batch)
        elif kind is Kind.D:
            offer_backward(Side.F, layer, micro_batch)
    return Schedule(
        placement=placement,
        num_micro_batches=micro_batches,
        forward_only=forward_only,
        actions={group: tuple(actions) for group, actions in lists.items()},
        parameters={},
    )


@st.composite
def sent_late(draw: st.DrawFn, schedules: st.SearchStrategy[Schedule]) -> Schedule:
    """Schedules without RECVs, some of whose messages are sent later than they are made, maybe too late."""
    schedule = add_communication(draw(schedules))
    rng, share = random.Random(draw(st.integers(0, 2**32))), draw(st.sampled_from((0.1, 0.5, 1.0)))
    lists: dict[Group, tuple[Action, ...]] = {}
    for group, actions in schedule.actions.items():
        mine = [action for action in actions if action.kind is not Kind.RECV]
        for at in reversed(range(len(mine))):
            if mine[at].kind is Kind.SEND and rng.random() < share:
                to = rng.randint(at, min(at + rng.choice((2, 6, 20)), len(mine) - 1))
                mine.insert(to, mine.pop(at))
        lists[group] = tuple(mine)
    return dataclasses.replace(schedule, actions=lists)


@st.composite
def ports_in_order(draw: st.DrawFn, schedules: st.SearchStrategy[Schedule]) -> Schedule:
    """Schedules whose ports serve messages in the order of the lists, maybe in one in which they lock.

    Receives of different channels change places; each channel keeps its order.
    """
    schedule = lowered(draw(schedules))
    rng, share = random.Random(draw(st.integers(0, 2**32))), draw(st.sampled_from((0.0, 0.1, 0.5)))
    lists: dict[Group, tuple[Action, ...]] = {}
    for group, actions in schedule.actions.items():
        mine = list(actions)
        places = [at for at, action in enumerate(mine) if action.kind is Kind.RECV]
        for at, other in pairwise(places):
            first, second = mine[at], mine[other]
            if (first.edge, first.gradient) != (second.edge, second.gradient) and rng.random() < share:
                mine[at], mine[other] = second, first
        lists[group] = tuple(mine)
    return dataclasses.replace(schedule, actions=lists, ports_in_order=True)
