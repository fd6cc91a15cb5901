"""What the search may choose from, and the candidates it makes of that."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import (
    DISPATCH_MODES,
    IN_TURN,
    SCHEDULE_KINDS,
    Allocation,
    DispatchMode,
    NodeLayout,
    ScheduleKind,
)
from megatron_disagmoe.planner.arrays import Bools, Ints

LAYOUTS = (NodeLayout.SEPARATE, NodeLayout.PAIRED, NodeLayout.SPREAD)

#: How FFN ranks trade time for memory: recomputation, and whether their input is dispatched again.
FfnLever = tuple[Recompute, bool]
FFN_LEVERS: tuple[FfnLever, ...] = (
    (Recompute.NONE, False),
    (Recompute.SELECTIVE, False),
    (Recompute.FULL, False),
    (Recompute.FULL, True),
)


@dataclass(frozen=True)
class Space:
    """Choices the search has. Sizes given as None are free."""

    attention_groups: tuple[int, ...] | None = None
    ffn_groups: tuple[int, ...] | None = None
    attention_ranks: tuple[int, ...] | None = None
    ffn_ranks: tuple[int, ...] | None = None
    replicas: tuple[int, ...] | None = None
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    context_parallel: tuple[int, ...] = (1, 2, 4, 8)
    expert_tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    recompute_attention: tuple[Recompute, ...] = tuple(Recompute)
    ffn_levers: tuple[FfnLever, ...] = FFN_LEVERS
    dispatch: tuple[DispatchMode, ...] = DISPATCH_MODES
    layouts: tuple[NodeLayout, ...] = LAYOUTS
    schedules: tuple[ScheduleKind, ...] = SCHEDULE_KINDS
    place_layers: tuple[str, ...] = (IN_TURN, "balanced")
    asymmetric: bool = True
    whole_nodes: bool = False
    distributed_optimizer: bool = True
    bytes_per_parameter: tuple[int, ...] | None = None
    max_gpus: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) == ():
                raise ValueError(f"the search has nothing to choose from for {field.name}: allow at least one value")


def fixed_sizes(space: Space, a: Allocation) -> Space:
    """``space`` with the sizes of one allocation."""
    only: dict[str, Any] = {name: (value,) for name, value in a.sizes.items()}
    return replace(space, **only)


@dataclass(frozen=True)
class Candidates:
    """Allocations as arrays of one length; levers, modes and layouts by their number.

    ``cut``: index of the (TP, CP) pair among the problem's; ``nics``: of the split of a node's NICs. ``layout``,
    ``dispatch``, ``recompute``, ``ffn_lever``, ``kind``: index in LAYOUTS, DISPATCH_MODES, Recompute, FFN_LEVERS,
    SCHEDULE_KINDS. ``group_size``: G, even groups; 0 where it is not chosen yet.
    """

    attention_groups: Ints
    ffn_groups: Ints
    attention_ranks: Ints
    ffn_ranks: Ints
    replicas: Ints
    cut: Ints
    expert_tensor_parallel: Ints
    layout: Ints
    dispatch: Ints
    nics: Ints
    recompute: Ints
    ffn_lever: Ints
    kind: Ints
    group_size: Ints

    def __len__(self) -> int:
        return len(self.attention_groups)

    def take(self, which: Ints | Bools) -> Self:
        """Some of them."""
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))

    def with_(self, **columns: Ints | int) -> Self:
        """The same with some columns replaced."""
        full = {name: np.broadcast_to(np.asarray(value, np.int64), len(self)) for name, value in columns.items()}
        return replace(self, **full)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The columns."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """All of several."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

