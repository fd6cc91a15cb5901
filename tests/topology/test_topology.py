"""Who holds what and who talks to whom: tables worked by hand, and what must hold for any sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_disagmoe.schedules.actions import Edge, Group, Placement, Side
from megatron_disagmoe.topology import Role, Topology, count_replicas

A0, A1, A2, F0, F1 = Group(Side.A, 0), Group(Side.A, 1), Group(Side.A, 2), Group(Side.F, 0), Group(Side.F, 1)


def round_robin(layers: int, p_a: int, p_f: int, *, m: int = 1, n: int = 1, r: int = 1) -> Topology:
    placement = Placement.round_robin(num_layers=layers, num_attention_groups=p_a, num_ffn_groups=p_f)
    return Topology(placement, attention_ranks=m, ffn_ranks=n, replicas=r)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Any placement in which every group holds something; small sizes."""
    p_a, p_f = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_layers = max(p_f, p_a - 1) + draw(st.integers(0, 4))
    attention = draw(st.permutations([*range(p_a), *draw(filled(num_layers + 1 - p_a, p_a))]))
    ffn = draw(st.permutations([*range(p_f), *draw(filled(num_layers - p_f, p_f))]))
    placement = Placement(p_a, p_f, tuple(attention), tuple(ffn))
    m, n, r = (draw(st.integers(1, 3)) for _ in range(3))
    return Topology(placement, attention_ranks=m, ffn_ranks=n, replicas=r, redispatch=draw(st.booleans()))


def filled(count: int, groups: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, groups - 1), min_size=count, max_size=count)


def test_it_is_pure() -> None:
    """Commands that only reason about sizes must not pay for importing torch."""
    code = "import sys, megatron_disagmoe.topology, megatron_disagmoe.model_layers; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'megatron_disagmoe.topology'" in modules
    assert "'torch'" not in modules
    assert "'megatron.core'" not in modules


class TestByHand:
    def test_one_of_each(self) -> None:
        topology = round_robin(4, 1, 1)
        assert topology.world_size == 2
        assert [str(topology.role(rank)) for rank in range(2)] == ["F0 r0 n0", "A0 r0 m0"]

    def test_two_groups_whose_tail_is_on_the_first(self) -> None:
        # L = 4: the tail is A(4) on A0, so A0 comes last and the last rank holds the loss.
        topology = round_robin(4, 2, 2, m=2, n=1)
        assert topology.group_order == (F0, F1, A1, A0)
        assert {group: list(block) for group, block in topology.blocks.items()} == {
            F0: [0],
            F1: [1],
            A1: [2, 3],
            A0: [4, 5],
        }
        assert topology.columns == ((2, 4), (3, 5))

    def test_three_layers_on_two_groups(self) -> None:
        # L = 3: the tail is A(3) on A1.
        topology = round_robin(3, 2, 2)
        assert topology.group_order == (F0, F1, A0, A1)
        assert topology.role(3) == Role(A1, 0, 0)

    def test_replicas_follow_each_other_in_a_block(self) -> None:
        topology = round_robin(2, 1, 1, m=2, n=3, r=2)
        assert topology.world_size == 10
        assert topology.data_parallel_size == 4
        assert topology.ranks(F0, 0) == (0, 1, 2)
        assert topology.ranks(F0, 1) == (3, 4, 5)
        assert topology.ranks(A0, 0) == (6, 7)
        assert topology.ranks(A0, 1) == (8, 9)
        assert topology.role(4) == Role(F0, 1, 1)
        assert topology.role(9) == Role(A0, 1, 1)

    def test_more_attention_groups_than_ffn_groups(self) -> None:
        topology = round_robin(4, 3, 1, n=2)  # tail: A(4) on A1
        assert topology.group_order == (F0, A2, A0, A1)
        assert topology.world_size == 5

    def test_peers_of_every_edge(self) -> None:
        topology = round_robin(2, 2, 2, m=2, n=2)  # blocks F0 [0 1] F1 [2 3] A1 [4 5] A0 [6 7]
        a0, f0 = topology.role(7), topology.role(1)
        assert topology.peers(a0, Edge.M2N, 0, gradient=False) == (0, 1)
        assert topology.peers(f0, Edge.M2N, 0, gradient=False) == (6, 7)
        assert topology.peers(f0, Edge.N2M, 0, gradient=False) == (4, 5)  # A(1) finishes layer 0
        assert topology.peers(a0, Edge.N2M, 1, gradient=False) == (2, 3)  # the tail finishes layer 1
        assert topology.peers(a0, Edge.LANE, 0, gradient=False) == (5,)  # same column, A(1)
        assert topology.peers(a0, Edge.LANE, 0, gradient=True) == (5,)

    def test_channels_of_the_smallest_ring(self) -> None:
        names = [channel.name for channel in round_robin(3, 1, 1).channels]
        assert names == ["M2N A0->F0 r0", "M2N.grad F0->A0 r0", "N2M F0->A0 r0", "N2M.grad A0->F0 r0"]

    def test_channels_of_two_groups(self) -> None:
        forward = {str(c.name) for c in round_robin(4, 2, 2).channels if not c.gradient}
        assert forward == {
            *("M2N A0->F0 r0", "N2M F0->A1 r0", "LANE A0->A1 r0"),
            *("M2N A1->F1 r0", "N2M F1->A0 r0", "LANE A1->A0 r0"),
        }

    def test_a_placement_of_ones_own(self) -> None:
        placement = Placement(2, 1, attention=(1, 1, 0), ffn=(0, 0))
        topology = Topology(placement, attention_ranks=1, ffn_ranks=1, replicas=1)
        assert topology.group_order == (F0, A1, A0)
        assert placement.attention_group(0) == A1
        lanes = [channel.name for channel in topology.channels if channel.edge is Edge.LANE]
        assert lanes == ["LANE A1->A0 r0", "LANE.grad A0->A1 r0"]  # layer 0 stays on A1


class TestRefused:
    def test_a_rank_that_does_not_exist(self) -> None:
        with pytest.raises(ValueError, match="rank 2 does not exist in a world of 2"):
            round_robin(1, 1, 1).role(2)

    @pytest.mark.parametrize("name, sizes", [("--af-attention-ranks", {"m": 0}), ("--af-ffn-ranks", {"n": 0})])
    def test_sizes_below_one(self, name: str, sizes: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            round_robin(1, 1, 1, **sizes)

    def test_more_groups_than_layers(self) -> None:
        with pytest.raises(ValueError, match="--af-attention-groups 3 does not fit 2 MoE layers"):
            round_robin(2, 3, 1)

    def test_a_group_with_nothing_to_do(self) -> None:
        placement = Placement(2, 2, attention=(0, 1, 0), ffn=(0, 0))
        with pytest.raises(ValueError, match="group F1 holds no stage of 2 MoE layers"):
            Topology(placement, attention_ranks=1, ffn_ranks=1, replicas=1)

    @pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
    def test_a_world_that_is_no_whole_number_of_rings(self, world_size: int) -> None:
        with pytest.raises(ValueError, match=rf"{world_size} processes do not fit.*= 4 processes; start a multiple of"):
            count_replicas(world_size, num_attention_groups=2, num_ffn_groups=1, attention_ranks=1, ffn_ranks=2)

    @pytest.mark.parametrize("replicas", [1, 2, 5])
    def test_whole_rings_are_counted(self, replicas: int) -> None:
        sizes = {"num_attention_groups": 2, "num_ffn_groups": 1, "attention_ranks": 1, "ffn_ranks": 2}
        assert count_replicas(4 * replicas, **sizes) == replicas


class TestAnySizes:
    @given(topologies())
    def test_every_rank_has_one_role_and_every_role_one_rank(self, topology: Topology) -> None:
        roles = [topology.role(rank) for rank in range(topology.world_size)]
        assert len(set(roles)) == topology.world_size
        for rank, role in enumerate(roles):
            assert topology.ranks(role.group, role.replica)[role.index] == rank
        assert sorted(rank for block in topology.blocks.values() for rank in block) == list(range(topology.world_size))

    @given(topologies())
    def test_the_last_rank_holds_the_loss_and_rank_0_is_an_ffn_rank(self, topology: Topology) -> None:
        assert topology.role(topology.world_size - 1).group == topology.placement.tail_group
        assert topology.role(0).group.side is Side.F

    @given(topologies())
    def test_columns_cut_the_attention_side_crosswise(self, topology: Topology) -> None:
        attention = [rank for group, block in topology.blocks.items() if group.side is Side.A for rank in block]
        assert sorted(rank for column in topology.columns for rank in column) == sorted(attention)
        for column in topology.columns:
            roles = [topology.role(rank) for rank in column]
            assert len({(role.replica, role.index) for role in roles}) == 1
            assert len({role.group for role in roles}) == topology.placement.num_attention_groups

    @given(topologies())
    def test_both_ends_agree_on_every_edge(self, topology: Topology) -> None:
        placement = topology.placement
        for layer in range(placement.num_layers):
            for edge in (Edge.M2N, Edge.N2M, Edge.LANE):
                if placement.is_local(edge, layer):
                    continue
                for gradient in (False, True):
                    self.check_edge(topology, edge, layer, gradient)

    def check_edge(self, topology: Topology, edge: Edge, layer: int, gradient: bool) -> None:
        for replica in range(topology.replicas):
            channel = topology.channel(edge, layer, gradient=gradient, replica=replica)
            assert topology.channels.count(channel) == 1
            assert (channel.source, channel.target) == topology.placement.ends(edge, layer, gradient=gradient)
            for ranks, others in (
                (channel.source_ranks, channel.target_ranks),
                (channel.target_ranks, channel.source_ranks),
            ):
                for rank in ranks:
                    role = topology.role(rank)
                    assert role.replica == replica
                    peers = topology.peers(role, edge, layer, gradient=gradient)
                    assert set(peers) <= set(others)
                    assert len(peers) == (1 if edge is Edge.LANE else len(others))
                    for peer in peers:
                        assert rank in topology.peers(topology.role(peer), edge, layer, gradient=gradient)

    @given(topologies())
    def test_channel_names_are_unique_and_channels_are_needed(self, topology: Topology) -> None:
        names = [channel.name for channel in topology.channels]
        assert len(set(names)) == len(names)
        placement = topology.placement
        needed = {
            (edge, gradient, *placement.ends(edge, layer, gradient=gradient))
            for layer in range(placement.num_layers)
            for edge in (Edge.M2N, Edge.N2M, Edge.LANE)
            for gradient in (False, True)
        }
        if topology.redispatch:
            needed |= {(Edge.AGAIN, False, *placement.ends(Edge.AGAIN, layer)) for layer in range(placement.num_layers)}
        for channel in topology.channels:
            assert (channel.edge, channel.gradient, channel.source, channel.target) in needed
            assert channel.source != channel.target
