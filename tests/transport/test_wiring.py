"""Nodes of FFN ranks, the channels among them, and the words for what was sent."""

from __future__ import annotations

import pytest

from megatron_disagmoe.runtime.links import channel_specs, node_channels
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.topology import Topology
from megatron_disagmoe.transport import ChannelTraffic
from megatron_disagmoe.transport.traffic import as_numbers, format_traffic, from_numbers


def topology_of(*, groups: int = 1, m: int = 2, n: int = 4, replicas: int = 1) -> Topology:
    placement = Placement.round_robin(num_layers=4, num_attention_groups=groups, num_ffn_groups=groups)
    return Topology(placement=placement, attention_ranks=m, ffn_ranks=n, replicas=replicas)


@pytest.mark.parametrize(
    "sizes, ranks_per_node, found",
    [
        ({"n": 4}, 8, 4),
        ({"n": 4}, 2, 2),
        ({"n": 4}, 1, 1),
        ({"n": 4, "groups": 3, "replicas": 2}, 4, 4),
        ({"n": 4, "groups": 3, "replicas": 2}, 2, 2),
        ({"n": 3, "groups": 2}, 3, 3),
    ],
)
def test_ffn_ranks_on_a_node(sizes: dict[str, int], ranks_per_node: int, found: int) -> None:
    assert topology_of(**sizes).ffn_ranks_on_a_node(ranks_per_node) == found


@pytest.mark.parametrize(
    "sizes, ranks_per_node, where",
    [
        ({"n": 4}, 3, "F0 r0 has ranks 0-2 on node 0 and F0 r0 has ranks 3-3 on node 1"),
        ({"n": 3, "groups": 2}, 4, "F0 r0 has ranks 0-2 on node 0 and F1 r0 has ranks 3-3 on node 0"),
        ({"n": 4, "replicas": 2}, 6, "F0 r0 has ranks 0-3 on node 0 and F0 r1 has ranks 4-5 on node 0"),
    ],
)
def test_uneven_nodes_are_refused(sizes: dict[str, int], ranks_per_node: int, where: str) -> None:
    with pytest.raises(ValueError, match=f"{where}.*choose sizes of which one divides the other, or --af-dispatch"):
        topology_of(**sizes).ffn_ranks_on_a_node(ranks_per_node)


def test_channels_among_the_ranks_of_a_node() -> None:
    topology = topology_of(groups=2, replicas=2)
    edges = channel_specs(topology)
    channels = channel_specs(topology, ffn_node_size=2)
    assert channels[: len(edges)] == edges
    among = channels[len(edges) :]
    assert len({channel.name for channel in channels}) == len(channels)
    assert len(among) == 2 * 2 * 2 * 4  # groups, replicas, nodes of a group, steps and their gradients
    for rank in range(topology.world_size):
        node = node_channels(topology, rank, ffn_node_size=2)
        mine = [channel for channel in among if rank in channel.ranks]
        assert mine == ([] if node is None else node.all)
        assert (node is None) == (topology.role(rank).group.side.value == "A")
        assert all(channel.ranks == [rank // 2 * 2, rank // 2 * 2 + 1] for channel in mine)
    assert node_channels(topology, 0, ffn_node_size=1) is None


def test_traffic_is_added_up_by_kind() -> None:
    traffic = {
        "M2N A0->F0 r0": ChannelTraffic(messages=2, hidden_rows=8, hidden=1024, side=64, header=160),
        "M2N A0->F1 r0": ChannelTraffic(messages=2, hidden_rows=4, hidden=512, side=32, header=160),
        "FANIN.grad F0[0-1] r0": ChannelTraffic(messages=1, hidden_rows=2, hidden=256, side=0, header=80),
    }
    numbers = as_numbers(traffic)
    assert len(numbers) == len(as_numbers({}))
    by_kind = from_numbers(numbers)
    assert list(by_kind) == ["M2N", "FANIN.grad"]
    assert by_kind["M2N"] == ChannelTraffic(messages=4, hidden_rows=12, hidden=1536, side=96, header=320)
    assert format_traffic(by_kind, steps=2) == (
        "M2N 816 B, 6 rows | FANIN.grad 128 B, 1 rows | total 1144 B: 896 hidden, 48 side, 200 headers"
    )
