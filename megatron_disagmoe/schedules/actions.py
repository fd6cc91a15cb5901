"""The vocabulary of a schedule: groups, stages, edges, actions, placement.

Stages are numbered by MoE layer. ``A(i)``, ``0 <= i < L``, runs on an attention group, ``F(i)`` on an
FFN group, and ``A(L)`` is the tail (finishes the last layer, then final norm, output layer, loss).
Tokens flow ``A(0) -> F(0) -> A(1) -> ... -> F(L-1) -> A(L)``; beside them the lane
``A(i) -> A(i+1)`` carries the residual. Backward runs every edge the other way.

An edge is named after the layer it leaves in forward:

    M2N(i)    A(i)  -> F(i)      dispatch
    N2M(i)    F(i)  -> A(i+1)    combine
    LANE(i)   A(i)  -> A(i+1)    residual, shared-expert output, routing metadata
    AGAIN(i)  A(i)  -> F(i)      the dispatch repeated before backward; forward direction only

A stage ``F(i)`` of one micro-batch is *re-dispatched* where the group of ``A(i)`` has an action ``D`` for
it: the FFN group drops the stage's input when its forward ends and gets it back over AGAIN(i) in time for
its backward.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class _Name(enum.Enum):
    """Members hash by identity: ``Enum`` hashes in Python, and these are part of keys everywhere."""

    __hash__ = object.__hash__


class Side(_Name):
    """Which half of the model a group holds."""

    A = "A"
    F = "F"


class Group(NamedTuple):
    """One pipeline position of one side; its text form is ``A0``, ``F3``."""

    side: Side
    index: int  # type: ignore[assignment]  # shadows tuple.index, which no group needs

    def __str__(self) -> str:
        return f"{self.side.value}{self.index}"


class Kind(_Name):
    """What an action does. ``B`` is ``I`` followed at once by ``W``.

    ``D`` (attention groups only) dispatches a stage's tokens a second time; it computes nothing.
    ``RECV`` *posts* a receive and never blocks; the compute action that needs the data waits for it.
    ``SEND`` starts a transfer and never blocks.
    """

    F = "F"
    B = "B"
    I = "I"
    W = "W"
    D = "D"
    SEND = "SEND"
    RECV = "RECV"


class Edge(_Name):
    """The kinds of edge between stages (see the module's docstring)."""

    M2N = "M2N"
    N2M = "N2M"
    LANE = "LANE"
    AGAIN = "AGAIN"


class Action(NamedTuple):
    """One step of one group's list.

    Compute actions have ``edge is None`` and ``layer`` names the stage on that group's side.
    Transfers name their edge; ``layer`` is the edge's layer and ``gradient`` says whether it carries
    the gradient (and so runs the edge backwards).
    """

    kind: Kind
    layer: int
    micro_batch: int
    edge: Edge | None = None
    gradient: bool = False


@dataclass(frozen=True)
class Placement:
    """Which group holds which stage.

    ``attention[i]`` is the index of the attention group of ``A(i)``, ``0 <= i <= L`` (the last entry is
    the tail); ``ffn[i]`` that of the FFN group of ``F(i)``.
    """

    num_attention_groups: int
    num_ffn_groups: int
    attention: tuple[int, ...]
    ffn: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.ffn) + 1 or not self.ffn:
            raise ValueError(
                f"a placement of {len(self.ffn)} MoE layers needs at least one layer and one more attention stage "
                f"(the tail) than layers; got {len(self.attention)} attention stages"
            )
        for name, groups, size in (
            ("attention", self.attention, self.num_attention_groups),
            ("FFN", self.ffn, self.num_ffn_groups),
        ):
            wrong = [g for g in groups if not 0 <= g < size]
            if wrong:
                raise ValueError(f"{name} group {wrong[0]} does not exist: there are {size}")

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.ffn)

    @property
    def tail_group(self) -> Group:
        """The attention group that holds the loss."""
        return Group(Side.A, self.attention[-1])

    @property
    def groups(self) -> tuple[Group, ...]:
        """Every group, attention first."""
        return tuple(Group(Side.A, g) for g in range(self.num_attention_groups)) + tuple(
            Group(Side.F, g) for g in range(self.num_ffn_groups)
        )

    def attention_group(self, layer: int) -> Group:
        """Group of ``A(layer)``; ``layer == num_layers`` is the tail."""
        return Group(Side.A, self.attention[layer])

    def ffn_group(self, layer: int) -> Group:
        """Group of ``F(layer)``."""
        return Group(Side.F, self.ffn[layer])

    def ends(self, edge: Edge, layer: int, *, gradient: bool = False) -> tuple[Group, Group]:
        """Sender and receiver of ``edge`` at ``layer``; swapped for the gradient."""
        source = self.ffn_group(layer) if edge is Edge.N2M else self.attention_group(layer)
        target = self.ffn_group(layer) if edge in (Edge.M2N, Edge.AGAIN) else self.attention_group(layer + 1)
        return (target, source) if gradient else (source, target)

    def is_local(self, edge: Edge, layer: int) -> bool:
        """True where both ends are one group: a hand-over in memory, no transfer."""
        source, target = self.ends(edge, layer)
        return source == target

    @classmethod
    def round_robin(cls, *, num_layers: int, num_attention_groups: int, num_ffn_groups: int) -> Placement:
        """The paper's placement: layer ``i`` on groups ``i mod p_A`` and ``i mod p_F``, the tail on ``L mod p_A``.

        Raises:
            ValueError: where a group would hold no layer.
        """
        for name, size in (("--af-attention-groups", num_attention_groups), ("--af-ffn-groups", num_ffn_groups)):
            if not 1 <= size <= num_layers:
                raise ValueError(
                    f"{name} {size} does not fit {num_layers} MoE layers: every group needs a layer; "
                    f"choose between 1 and {num_layers}"
                )
        return cls(
            num_attention_groups=num_attention_groups,
            num_ffn_groups=num_ffn_groups,
            attention=tuple(i % num_attention_groups for i in range(num_layers + 1)),
            ffn=tuple(i % num_ffn_groups for i in range(num_layers)),
        )


@dataclass(frozen=True)
class Schedule:
    """For each group the ordered list of its actions; all ranks of a group run the same list.

    ``parameters`` records what the builder was given (kind, group size, stage times, cap), for people
    and for ``schedule draw``; nothing that runs a schedule reads it. ``ports_in_order``: a group's sending
    port serves its messages in the order of its SENDs and its receiving port in that of its RECVs, lanes
    aside; else both serve them as they come.
    """

    placement: Placement
    num_micro_batches: int
    forward_only: bool
    actions: dict[Group, tuple[Action, ...]]
    parameters: dict[str, object]
    ports_in_order: bool = False
