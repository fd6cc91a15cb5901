"""The edges of the schedule as seen from one rank: which channel, which peers, which message."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_disagmoe.schedules.actions import Edge, Side
from megatron_disagmoe.schedules.dataflow import Port
from megatron_disagmoe.topology import Channel, Role, Topology
from megatron_disagmoe.tracing.recorder import NullRecorder, Recorder, edge_name
from megatron_disagmoe.transport.base import (
    ChannelSpec,
    Message,
    MessageSpec,
    RecvHandle,
    SendHandle,
    TransferKey,
    Transport,
)
from megatron_disagmoe.transport.dispatch import NodeChannels
from megatron_disagmoe.transport.precision import WireFormat


def channel_specs(topology: Topology, *, ffn_node_size: int = 1) -> list[ChannelSpec]:
    """Every channel of the world, as a transport opens them: edges, then those among the FFN ranks of each node.

    Args:
        topology: who talks to whom.
        ffn_node_size: FFN ranks that exchange among themselves (``Dispatcher.node_size``).
    """
    channels = [_spec(channel) for channel in topology.channels]
    for group in topology.group_order:
        if group.side is Side.F and ffn_node_size > 1:
            for replica in range(topology.replicas):
                ranks = topology.ranks(group, replica)
                for start in range(0, len(ranks), ffn_node_size):
                    channels += _node(topology, ranks[start], ffn_node_size).all
    return channels


def node_channels(topology: Topology, rank: int, *, ffn_node_size: int) -> NodeChannels | None:
    """The channels among the FFN ranks of ``rank``'s node and group; None where it exchanges with nobody."""
    if ffn_node_size == 1 or topology.role(rank).group.side is Side.A:
        return None
    return _node(topology, rank, ffn_node_size)


def _node(topology: Topology, rank: int, size: int) -> NodeChannels:
    role = topology.role(rank)
    start = role.index // size * size
    ranks = topology.ranks(role.group, role.replica)[start : start + size]
    return NodeChannels.among(ranks, name=f"{role.group}[{start}-{start + size - 1}] r{role.replica}")


def _spec(channel: Channel) -> ChannelSpec:
    return ChannelSpec(channel.name, channel.source_ranks, channel.target_ranks)


@dataclass(frozen=True)
class EdgeSpecs:
    """What stages give and get on each kind of edge, forward and as gradient.

    Attributes:
        specs: by edge and whether it is the gradient; what p_A = 1 leaves out (lanes) may be missing.
        wire: how it travels, lanes excepted: the residual is not rounded.
    """

    specs: dict[tuple[Edge, bool], MessageSpec]
    wire: WireFormat = field(default_factory=WireFormat)

    def of(self, port: Port) -> MessageSpec:
        """The spec of the messages on ``port``."""
        return self.specs[port.edge, port.gradient]

    def wire_of(self, port: Port) -> WireFormat:
        """How they travel."""
        return WireFormat() if port.edge is Edge.LANE else self.wire


@dataclass(frozen=True)
class _Route:
    channel: ChannelSpec
    peers: tuple[int, ...]
    spec: MessageSpec
    wire: WireFormat
    wire_spec: MessageSpec


class Links:
    """Sends to and receives from the peers of this rank, edge by edge. Nothing blocks but ``Incoming.wait``."""

    def __init__(
        self,
        topology: Topology,
        role: Role,
        transport: Transport,
        specs: EdgeSpecs,
        recorder: Recorder | None = None,
    ) -> None:
        self.topology = topology
        self.role = role
        self.transport = transport
        self.specs = specs
        self._recorder = recorder or NullRecorder()
        self._routes: dict[Port, _Route] = {}
        self._sent: list[_Sent] = []

    def _route(self, port: Port) -> _Route:
        route = self._routes.get(port)
        if route is None:
            channel = self.topology.channel(port.edge, port.layer, gradient=port.gradient, replica=self.role.replica)
            peers = self.topology.peers(self.role, port.edge, port.layer, gradient=port.gradient)
            spec, wire = self.specs.of(port), self.specs.wire_of(port)
            route = self._routes[port] = _Route(_spec(channel), peers, spec, wire, wire.spec(spec))
        return route

    def send(self, port: Port, micro_batch: int, messages: list[Message]) -> None:
        """Start one message to each peer, in order of the peers' index."""
        route = self._route(port)
        key = TransferKey(port.edge.value, port.gradient, port.layer, micro_batch)
        for peer, message in zip(route.peers, messages, strict=True):
            encoded = route.wire.encode(message, route.spec)
            start = time.perf_counter_ns()
            handle = self.transport.send(route.channel, key, peer, encoded, route.wire_spec)
            if self._recorder.enabled:
                self._sent.append(_Sent(port, micro_batch, peer, start, encoded.num_bytes, handle))

    def receive(self, port: Port, micro_batch: int) -> Incoming:
        """Post the receive of one message from each peer."""
        route = self._route(port)
        key = TransferKey(port.edge.value, port.gradient, port.layer, micro_batch)
        post = self.transport.post_recv
        start = time.perf_counter_ns()
        handles = [post(route.channel, key, peer, route.wire_spec) for peer in route.peers]
        return Incoming(route.peers, handles, route, start)

    def finish(self) -> None:
        """At the end of a step: wait until everything sent has been taken."""
        self.transport.flush()
        for sent in self._sent:
            end = sent.handle.completed_ns or sent.start
            name = edge_name(sent.port.edge, sent.port.gradient)
            self._recorder.send(name, sent.port.layer, sent.micro_batch, sent.peer, sent.start, end, sent.num_bytes)
        self._sent.clear()


class _Sent(NamedTuple):
    """A message for the trace."""

    port: Port
    micro_batch: int
    peer: int
    start: int
    num_bytes: int
    handle: SendHandle


@dataclass(slots=True)
class Incoming:
    """Receives under way, one from each peer; ``posted_ns``: since when, by ``time.perf_counter_ns``."""

    peers: tuple[int, ...]
    handles: list[RecvHandle]
    _route: _Route
    posted_ns: int

    def wait(self) -> list[Message]:
        """Every message, the caller's to keep (``RecvHandle.take``)."""
        return [self._route.wire.take(handle, self._route.spec) for handle in self.handles]
