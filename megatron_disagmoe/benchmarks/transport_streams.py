"""Streams of messages in both directions between M attention and N FFN ranks, in each dispatch mode.

Both directions are independent of each other and busy at once. A stream sends what one micro-batch after the other
would, with a few under way; it computes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_disagmoe.transport import (
    ChannelSpec,
    Message,
    MessageSpec,
    TransferKey,
    Transport,
)
from megatron_disagmoe.transport.dispatch import Dispatcher, NodeChannels, TransportExchange
from megatron_disagmoe.transport.dispatch.node import FAN_IN, FAN_OUT

#: Receives posted and messages on their way out at once, as a schedule has a few of them: with only one under way
#: the link would idle while its end is noticed and the next begun.
AHEAD, SENDING = 4, 2


@dataclass
class Sent:
    """What this rank has sent to the other side: payload bytes, and rows of hidden states among them."""

    payload: int = 0
    hidden_rows: int = 0


class Stream(ABC):
    """Micro-batches moved one after the other; every rank calls the same methods in the same order."""

    #: Names of the row this stream belongs to.
    transport: str
    dispatch: str | None

    @abstractmethod
    def start(self, count: int) -> None:
        """Begin ``count`` micro-batches, at most ``AHEAD``, without waiting for any."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all that was begun is done at this rank."""

    @abstractmethod
    def run(self, count: int) -> None:
        """Move ``count`` micro-batches, a few under way."""

    @abstractmethod
    def sent(self) -> Sent:
        """Totals so far."""


class Pipelined(Stream):
    """A stream whose micro-batches are received and sent apart from each other."""

    def __init__(self) -> None:
        self._receives: deque[list[Any]] = deque()
        self._sends: deque[list[Any]] = deque()

    @abstractmethod
    def _post(self) -> None:
        """Post the receives of the next micro-batch into ``_receives``."""

    @abstractmethod
    def _send(self) -> None:
        """Begin to send the next micro-batch, into ``_sends``."""

    def _take(self) -> None:
        """Wait for the oldest micro-batch to receive."""
        for handle in self._receives.popleft():
            handle.wait()

    def start(self, count: int, *, posted: int | None = None) -> None:
        for _ in range(count if posted is None else posted):
            self._post()
        for _ in range(count):
            self._send()

    def finish(self) -> None:
        while self._receives:
            self._take()
        while self._sends:
            self._wait_until_sent()

    def run(self, count: int) -> None:
        self.start(min(SENDING, count), posted=min(AHEAD, count))
        for i in range(count):
            self._take()
            if i + AHEAD < count:
                self._post()
            self._wait_until_sent()
            if i + SENDING < count:
                self._send()
        self.finish()

    def _wait_until_sent(self) -> None:
        for handle in self._sends.popleft():
            handle.wait()


class ModeChannels:
    """The channels of one dispatch mode; several modes share one transport."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        m, n = dispatcher.sizes.num_attention_ranks, dispatcher.sizes.num_ffn_ranks
        attention, ffn = tuple(range(m)), tuple(range(m, m + n))
        mode, size = dispatcher.mode, dispatcher.node_size
        self.m2n = ChannelSpec(f"M2N {mode}", attention, ffn)
        self.n2m = ChannelSpec(f"N2M {mode}", ffn, attention)
        starts = range(m, m + n, size) if size > 1 else ()
        self.nodes = [NodeChannels.among(range(s, s + size), name=f"{mode} {s}") for s in starts]

    @property
    def all(self) -> list[ChannelSpec]:
        """For `create_transport`."""
        return [self.m2n, self.n2m, *(channel for node in self.nodes for channel in node.all)]

    def node_of(self, rank: int) -> NodeChannels | None:
        """The node that ``rank`` exchanges on."""
        return next((node for node in self.nodes if rank in node.fan_out.source_ranks), None)


class _Recording(TransportExchange):
    """Keeps what a node exchanges, to be sent again and again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.moved: dict[str, tuple[list[Message], MessageSpec]] = {}

    def move(self, step: str, messages: list[Message], spec: MessageSpec, *, gradient: bool) -> list[Message]:
        self.moved[step] = messages, spec
        return super().move(step, messages, spec, gradient=gradient)


class DispatchStream(Pipelined):
    """What a dispatch mode sends for one routing of one micro-batch, repeated.

    Collective: the messages are made by sending one micro-batch through the mode.

    Args:
        name: of the transport.
        transport: opened with ``ModeChannels(dispatcher).all`` among its channels.
        dispatcher: the mode, for as many ranks as the world has.
        tokens: ``[T, h]``, of an attention rank.
        routing_map: bool ``[T, E]``, of an attention rank.
    """

    def __init__(
        self, name: str, transport: Transport, dispatcher: Dispatcher, tokens: torch.Tensor, routing_map: torch.Tensor
    ) -> None:
        super().__init__()
        self.transport, self.dispatch = name, dispatcher.mode
        self._transport = transport
        self._rank = dist.get_rank()
        m, n = dispatcher.sizes.num_attention_ranks, dispatcher.sizes.num_ffn_ranks
        channels = ModeChannels(dispatcher)
        node = channels.node_of(self._rank)
        exchange = None if node is None else _Recording(transport, node, rank=self._rank, layer=0, micro_batch=0)
        self._exchange = exchange
        specs = dispatcher.m2n_spec(), dispatcher.n2m_spec()
        self._is_attention = self._rank < m
        if self._is_attention:
            self._peers, self._out, self._in = range(m, m + n), channels.m2n, channels.n2m
            self._out_spec, self._in_spec = specs
        else:
            self._peers, self._out, self._in = range(m), channels.n2m, channels.m2n
            self._in_spec, self._out_spec = specs
        self._posted = self._begun = 0
        self._post()
        if self._is_attention:
            probs = routing_map.float() / dispatcher.sizes.topk
            self._messages, state = dispatcher.dispatch(tokens, probs, routing_map)
            self._send()
            dispatcher.combine([handle.wait() for handle in self._receives[0]], state)
        else:
            arrived = [handle.wait() for handle in self._receives[0]]
            given = dispatcher.expert_input(arrived, exchange)
            self._messages = dispatcher.expert_output(given.tokens.clone(), given.state)
            self._send()
        self._release()

    @property
    def message_bytes(self) -> list[int]:
        """Payload of the message to each peer."""
        return [sum(section.nbytes for section in message.sections) for message in self._messages]

    def finish(self) -> None:
        super().finish()
        self._transport.flush()

    def sent(self) -> Sent:
        traffic = self._transport.traffic[self._out.name]
        return Sent(traffic.payload, traffic.hidden_rows)

    def _post(self) -> None:
        key = TransferKey("STREAM", False, 0, self._posted)
        self._posted += 1
        self._receives.append([self._transport.post_recv(self._in, key, peer, self._in_spec) for peer in self._peers])

    def _send(self) -> None:
        key = TransferKey("STREAM", False, 0, self._begun)
        self._begun += 1
        pairs = zip(self._peers, self._messages, strict=True)
        self._sends.append(
            [self._transport.send(self._out, key, peer, message, self._out_spec) for peer, message in pairs]
        )

    def _take(self) -> None:
        for handle in self._receives[0]:
            handle.wait()
        self._release()
        if self._exchange is not None:
            for step in (FAN_OUT, FAN_IN):
                messages, spec = self._exchange.moved[step]
                self._exchange.move(step, messages, spec, gradient=False)

    def _release(self) -> None:
        for handle in self._receives.popleft():
            handle.release()
