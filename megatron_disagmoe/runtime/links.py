"""The edges of the schedule as seen from one rank: which channel, which peers, which message."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_disagmoe.schedules.actions import Edge
from megatron_disagmoe.schedules.dataflow import Port
from megatron_disagmoe.topology import Channel, Role, Topology
from megatron_disagmoe.transport.base import ChannelSpec, Message, MessageSpec, RecvHandle, TransferKey, Transport


def channel_specs(topology: Topology) -> list[ChannelSpec]:
    """Every channel of the world, as a transport opens them."""
    return [_spec(channel) for channel in topology.channels]


def _spec(channel: Channel) -> ChannelSpec:
    return ChannelSpec(channel.name, channel.source_ranks, channel.target_ranks)


@dataclass(frozen=True)
class EdgeSpecs:
    """What travels on each kind of edge, forward and as gradient; a lane's spec is None where p_A = 1."""

    specs: dict[tuple[Edge, bool], MessageSpec]

    def of(self, port: Port) -> MessageSpec:
        """The spec of the messages on ``port``."""
        return self.specs[port.edge, port.gradient]


class Links:
    """Sends to and receives from the peers of this rank, edge by edge. Nothing blocks but ``Incoming.wait``."""

    def __init__(self, topology: Topology, role: Role, transport: Transport, specs: EdgeSpecs) -> None:
        self.topology = topology
        self.role = role
        self.transport = transport
        self.specs = specs
        self._routes: dict[Port, tuple[ChannelSpec, tuple[int, ...], MessageSpec]] = {}

    def _route(self, port: Port) -> tuple[ChannelSpec, tuple[int, ...], MessageSpec]:
        route = self._routes.get(port)
        if route is None:
            channel = self.topology.channel(port.edge, port.layer, gradient=port.gradient, replica=self.role.replica)
            peers = self.topology.peers(self.role, port.edge, port.layer, gradient=port.gradient)
            route = self._routes[port] = (_spec(channel), peers, self.specs.of(port))
        return route

    def send(self, port: Port, micro_batch: int, messages: list[Message]) -> None:
        """Start one message to each peer, in order of the peers' index."""
        channel, peers, spec = self._route(port)
        key = TransferKey(port.edge.value, port.gradient, port.layer, micro_batch)
        for peer, message in zip(peers, messages, strict=True):
            self.transport.send(channel, key, peer, message, spec)

    def receive(self, port: Port, micro_batch: int) -> Incoming:
        """Post the receive of one message from each peer."""
        channel, peers, spec = self._route(port)
        key = TransferKey(port.edge.value, port.gradient, port.layer, micro_batch)
        return Incoming(peers, tuple(self.transport.post_recv(channel, key, peer, spec) for peer in peers))


@dataclass(frozen=True)
class Incoming:
    """Receives under way, one from each peer."""

    peers: tuple[int, ...]
    handles: tuple[RecvHandle, ...]

    def wait(self) -> list[Message]:
        """Every message, copied out of the transport's buffers, which go back at once.

        The buffers are sized for the worst routing, the messages are as large as they are: what a stage keeps until
        its backward is the latter.
        """
        messages = []
        for handle in self.handles:
            received = handle.wait()
            messages.append(Message(received.header.clone(), tuple(section.clone() for section in received.sections)))
            handle.release()
        return messages
