"""The schedule without overlap: one micro-batch at a time, all the way forward, then all the way back."""

from __future__ import annotations

from megatron_disagmoe.schedules.actions import Action, Group, Kind, Placement, Schedule, Side


def sequential(placement: Placement, *, num_micro_batches: int, forward_only: bool = False) -> Schedule:
    """Compute actions of every group; each group holds at most its own number of layers live.

    Raises:
        ValueError: where ``num_micro_batches`` is not positive.
    """
    if num_micro_batches < 1:
        raise ValueError(f"a schedule needs at least one micro-batch, got {num_micro_batches}")
    stages: dict[Group, list[int]] = {group: [] for group in placement.groups}
    for layer, index in enumerate(placement.attention):
        stages[Group(Side.A, index)].append(layer)
    for layer, index in enumerate(placement.ffn):
        stages[Group(Side.F, index)].append(layer)
    actions: dict[Group, tuple[Action, ...]] = {}
    for group, layers in stages.items():
        mine: list[Action] = []
        for micro_batch in range(num_micro_batches):
            mine += [Action(Kind.F, layer, micro_batch) for layer in layers]
            if not forward_only:
                mine += [Action(Kind.B, layer, micro_batch) for layer in reversed(layers)]
        actions[group] = tuple(mine)
    return Schedule(
        placement=placement,
        num_micro_batches=num_micro_batches,
        forward_only=forward_only,
        actions=actions,
        parameters={"kind": "sequential"},
    )
