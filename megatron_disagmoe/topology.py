"""Who holds what and who talks to whom, as plain data: no torch, no Megatron.

The world is cut into *blocks*, one per group, each a contiguous range of ranks, FFN groups first:

    F_0 .. F_(pF-1)   A_(t+1) .. A_(pA-1)  A_0 .. A_t          t = the tail's attention group

so that the last rank of the world holds the loss, which is where Megatron prints. Inside a block the
replicas follow each other; inside a replica the M attention (or N FFN) ranks do:

    rank = block start + replica * ranks per replica + index

Column ``(replica, index)`` is the set of attention ranks with the same replica and index: they see the
same batches and hand the residual lane to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_disagmoe.schedules.actions import Edge, Group, Placement, Side


@dataclass(frozen=True)
class Role:
    """What one rank is: ``index`` is m on the attention side and n on the FFN side."""

    group: Group
    replica: int
    index: int

    def __str__(self) -> str:
        letter = "m" if self.group.side is Side.A else "n"
        return f"{self.group} r{self.replica} {letter}{self.index}"


@dataclass(frozen=True)
class Channel:
    """One kind of edge, one direction, one pair of groups of one replica: what a transport opens up front."""

    edge: Edge
    gradient: bool
    source: Group
    target: Group
    replica: int
    source_ranks: tuple[int, ...]
    target_ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unique name, used in messages to people."""
        return f"{self.edge.value}{'.grad' if self.gradient else ''} {self.source}->{self.target} r{self.replica}"


@dataclass(frozen=True)
class Topology:
    """Sizes and placement; everything else follows.

    Attributes:
        placement: which group holds which MoE layer.
        attention_ranks: M, data-parallel ranks of an attention group.
        ffn_ranks: N, expert-parallel ranks of an FFN group.
        replicas: R, outer data-parallel copies of the whole ring.
        redispatch: tokens may be dispatched a second time, for backward.
    """

    placement: Placement
    attention_ranks: int
    ffn_ranks: int
    replicas: int
    redispatch: bool = False

    def __post_init__(self) -> None:
        for name, value in (
            ("--af-attention-ranks", self.attention_ranks),
            ("--af-ffn-ranks", self.ffn_ranks),
            ("replicas", self.replicas),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        placement = self.placement
        idle = [
            group
            for group in placement.groups
            if group.index not in (placement.attention if group.side is Side.A else placement.ffn)
        ]
        if idle:
            raise ValueError(
                f"group {idle[0]} holds no stage of {placement.num_layers} MoE layers, so its ranks would have nothing "
                f"to do; give it one, or leave it out of the placement"
            )

    @property
    def world_size(self) -> int:
        """R * (pA*M + pF*N)."""
        return self.replicas * ranks_per_replica(
            num_attention_groups=self.placement.num_attention_groups,
            num_ffn_groups=self.placement.num_ffn_groups,
            attention_ranks=self.attention_ranks,
            ffn_ranks=self.ffn_ranks,
        )

    @property
    def data_parallel_size(self) -> int:
        """M*R: how many different micro-batches are under way; vanilla's data-parallel size."""
        return self.attention_ranks * self.replicas

    @cached_property
    def group_order(self) -> tuple[Group, ...]:
        """Groups in order of their ranks."""
        p = self.placement.num_attention_groups
        first = self.placement.tail_group.index + 1
        ffn = tuple(Group(Side.F, g) for g in range(self.placement.num_ffn_groups))
        return ffn + tuple(Group(Side.A, (first + g) % p) for g in range(p))

    @cached_property
    def blocks(self) -> dict[Group, range]:
        """The ranks of every group, all replicas."""
        blocks, start = {}, 0
        for group in self.group_order:
            size = self.replicas * self.ranks_in_group(group.side)
            blocks[group] = range(start, start + size)
            start += size
        return blocks

    def ranks_in_group(self, side: Side) -> int:
        """M or N: ranks of one group in one replica."""
        return self.attention_ranks if side is Side.A else self.ffn_ranks

    def ranks(self, group: Group, replica: int) -> tuple[int, ...]:
        """Global ranks of ``group`` in ``replica``, in order of their index."""
        size = self.ranks_in_group(group.side)
        start = self.blocks[group].start + replica * size
        return tuple(range(start, start + size))

    def role(self, rank: int) -> Role:
        """The role of a global rank.

        Raises:
            ValueError: where there is no such rank.
        """
        for group, block in self.blocks.items():
            if rank in block:
                replica, index = divmod(rank - block.start, self.ranks_in_group(group.side))
                return Role(group, replica, index)
        raise ValueError(f"rank {rank} does not exist in a world of {self.world_size}")

    def ffn_ranks_on_a_node(self, ranks_per_node: int) -> int:
        """How many FFN ranks of a group share a node, where ranks ``r`` of equal ``r // ranks_per_node`` do.

        Raises:
            ValueError: where that differs from node to node, which per-node dispatch cannot use.
        """
        first: tuple[int, str] | None = None
        for group in self.group_order:
            if group.side is not Side.F:
                continue
            for replica in range(self.replicas):
                ranks = self.ranks(group, replica)
                for node in sorted({rank // ranks_per_node for rank in ranks}):
                    here = [rank for rank in ranks if rank // ranks_per_node == node]
                    found = len(here), f"{group} r{replica} has ranks {here[0]}-{here[-1]} on node {node}"
                    first = first or found
                    if found[0] != first[0]:
                        raise ValueError(
                            f"--af-dispatch per-node needs equally many FFN ranks of a group on each of its nodes, but "
                            f"{first[1]} and {found[1]} (--af-ranks-per-node {ranks_per_node}, --af-ffn-ranks "
                            f"{self.ffn_ranks}): choose sizes of which one divides the other, or --af-dispatch per-rank"
                        )
        assert first is not None, "there is always an FFN group"
        return first[0]

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """For each replica and index the attention ranks that see the same batches, in order of their ranks."""
        groups = [group for group in self.group_order if group.side is Side.A]
        return tuple(
            tuple(self.ranks(group, replica)[index] for group in groups)
            for replica in range(self.replicas)
            for index in range(self.attention_ranks)
        )

    @cached_property
    def channels(self) -> tuple[Channel, ...]:
        """Every channel of the world in one fixed order, the same on every rank; local lanes have none."""
        found: dict[tuple[Edge, bool, Group, Group], None] = {}
        for layer in range(self.placement.num_layers):
            for edge in (Edge.M2N, Edge.N2M, Edge.LANE):
                if not self.placement.is_local(edge, layer):
                    for gradient in (False, True):
                        source, target = self.placement.ends(edge, layer, gradient=gradient)
                        found[edge, gradient, source, target] = None
            if self.redispatch:
                found[Edge.AGAIN, False, *self.placement.ends(Edge.AGAIN, layer)] = None
        return tuple(
            Channel(edge, gradient, source, target, replica, self.ranks(source, replica), self.ranks(target, replica))
            for edge, gradient, source, target in found
            for replica in range(self.replicas)
        )

    def channel(self, edge: Edge, layer: int, *, gradient: bool, replica: int) -> Channel:
        """The channel that carries ``edge`` of ``layer`` in ``replica``."""
        source, target = self.placement.ends(edge, layer, gradient=gradient)
        return self._channel_by_ends[edge, gradient, source, target, replica]

    @cached_property
    def _channel_by_ends(self) -> dict[tuple[Edge, bool, Group, Group, int], Channel]:
        return {(c.edge, c.gradient, c.source, c.target, c.replica): c for c in self.channels}

    def peers(self, role: Role, edge: Edge, layer: int, *, gradient: bool) -> tuple[int, ...]:
        """The ranks at the other end of an edge, seen from ``role``, in order of their index.

        M2N and N2M join every attention rank with every FFN rank of the replica; a lane joins one
        attention rank with the one of the same column.
        """
        source, target = self.placement.ends(edge, layer, gradient=gradient)
        assert role.group in (source, target), f"{role} is at neither end of {edge.value} {layer}"
        other = self.ranks(target if role.group == source else source, role.replica)
        return (other[role.index],) if edge is Edge.LANE else other


def ranks_per_replica(*, num_attention_groups: int, num_ffn_groups: int, attention_ranks: int, ffn_ranks: int) -> int:
    """pA*M + pF*N: ranks of one whole ring."""
    return num_attention_groups * attention_ranks + num_ffn_groups * ffn_ranks


def count_replicas(
    world_size: int, *, num_attention_groups: int, num_ffn_groups: int, attention_ranks: int, ffn_ranks: int
) -> int:
    """R = world / (pA*M + pF*N).

    Raises:
        ValueError: where it is not a whole number of at least 1, with the sizes that would fit.
    """
    ring = ranks_per_replica(
        num_attention_groups=num_attention_groups,
        num_ffn_groups=num_ffn_groups,
        attention_ranks=attention_ranks,
        ffn_ranks=ffn_ranks,
    )
    if world_size < ring or world_size % ring:
        raise ValueError(
            f"{world_size} processes do not fit the AF-pipe sizes: one ring takes "
            f"{num_attention_groups} attention groups x {attention_ranks} + {num_ffn_groups} FFN groups x {ffn_ranks} "
            f"= {ring} processes; start a multiple of {ring}, "
            f"or change --af-attention-groups, --af-ffn-groups, --af-attention-ranks or --af-ffn-ranks"
        )
    return world_size // ring
