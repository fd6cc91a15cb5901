"""Hypothesis strategies for schedules: arbitrary ones (not necessarily runnable)."""

from __future__ import annotations

from hypothesis import strategies as st

from megatron_disagmoe.schedules.actions import Action, Edge, Kind, Placement, Schedule

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
    )
