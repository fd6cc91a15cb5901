"""What moves tensors between the two halves of the model: the interface every transport implements.

A *channel* joins two rank groups for one kind of edge in one direction. A *message* on it is a short header
of host integers (counts) and a few 2-D *sections* (tokens, probabilities, ...) whose row counts may differ
from message to message. Messages between one pair of ranks on one channel arrive in the order they were
sent; channels are independent of each other. Nothing here blocks except ``wait``, ``flush`` and ``close``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class TransportError(RuntimeError):
    """A transfer failed: the peer died, or sent what was not expected."""


class TransportTimeout(TransportError):
    """A transfer did not end within the transport's timeout."""


@dataclass(frozen=True)
class ChannelSpec:
    """One edge kind, one direction, one pair of rank groups.

    Attributes:
        name: such as ``"M2N A0->F1 r0"`` or ``"M2N.grad F1->A0 r0"``; unique, used in error messages.
        source_ranks: global ranks that send.
        target_ranks: global ranks that receive.
    """

    name: str
    source_ranks: tuple[int, ...]
    target_ranks: tuple[int, ...]

    @property
    def ranks(self) -> list[int]:
        """Every rank on the channel, ascending."""
        return sorted({*self.source_ranks, *self.target_ranks})


@dataclass(frozen=True)
class Section:
    """A 2-D tensor ``[rows, width]`` of a message; ``rows`` may be 0 and differs per message.

    Attributes:
        dtype: element type.
        width: elements a row.
        max_rows: the stated rule that sizes buffers (the dropless worst case).
        differentiable: False for what takes no part in autograd (indices).
        hidden: True for hidden-state rows: they are counted as such, and only they follow ``wire_dtype``.
    """

    dtype: torch.dtype
    width: int
    max_rows: int
    differentiable: bool = True
    hidden: bool = False

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize

    @cached_property
    def max_bytes(self) -> int:
        """Bytes of the largest section allowed."""
        return self.max_rows * self.row_bytes

    def __str__(self) -> str:
        return f"[<={self.max_rows}, {self.width}] {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class MessageSpec:
    """Sizes both ends must agree on: ``header_length`` int64 host words, then the sections in order."""

    header_length: int
    sections: tuple[Section, ...]

    @property
    def max_bytes(self) -> int:
        """Bytes of the largest payload allowed."""
        return sum(section.max_bytes for section in self.sections)

    @cached_property
    def plain(self) -> tuple[tuple[torch.dtype, int, int, int, bool], ...]:
        """Of every section: dtype, width, most rows, bytes of a row, hidden; quick to read for every message."""
        return tuple((s.dtype, s.width, s.max_rows, s.row_bytes, s.hidden) for s in self.sections)

    def __str__(self) -> str:
        return f"{self.header_length} header words and sections ({', '.join(map(str, self.sections))})"


class Message(NamedTuple):
    """``header``: int64 ``[header_length]`` on the host; ``sections``: one tensor per `Section` of the spec."""

    header: torch.Tensor
    sections: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of header and sections."""
        return self.header.nbytes + sum(section.nbytes for section in self.sections)


class TransferKey(NamedTuple):
    """Which transfer of the schedule a message is; it travels along and the receiver checks it.

    Attributes:
        edge: the edge's name, at most 7 ASCII characters (``"M2N"``, ``"N2M"``, ``"LANE"``, ``"AGAIN"``).
        gradient: whether it is the edge's gradient.
        layer: the MoE layer the edge leaves in forward.
        micro_batch: micro-batch of the step.
    """

    edge: str
    gradient: bool
    layer: int
    micro_batch: int

    def __str__(self) -> str:
        gradient = " gradient" if self.gradient else ""
        return f"{self.edge}{gradient} of layer {self.layer}, micro-batch {self.micro_batch}"


@dataclass
class ChannelTraffic:
    """What this rank has sent on one channel, in bytes.

    ``payload`` = ``hidden`` (hidden-state rows) + ``side`` (ids, probabilities, scales); ``header`` is apart.
    ``hidden_rows`` counts rows of hidden-state sections.
    """

    messages: int = 0
    hidden_rows: int = 0
    hidden: int = 0
    side: int = 0
    header: int = 0

    @property
    def payload(self) -> int:
        """Bytes of all sections."""
        return self.hidden + self.side

    def add(self, spec: MessageSpec, rows: Sequence[int], *, header: int) -> None:
        """Count one message of ``rows[i]`` rows in section ``i`` and ``header`` header bytes."""
        self.messages += 1
        self.header += header
        for (_, _, _, row_bytes, hidden), count in zip(spec.plain, rows, strict=True):
            if hidden:
                self.hidden += count * row_bytes
                self.hidden_rows += count
            else:
                self.side += count * row_bytes


class SendHandle(ABC):
    """A send under way.

    ``completed_ns``: when the peer was seen to have taken it (``time.perf_counter_ns``); None where that is not known.
    """

    completed_ns: int | None = None

    @abstractmethod
    def wait(self) -> None:
        """Block until the tensors given to ``send`` may be changed or freed.

        Raises:
            TransportError: where the peer died or did not take the message within the timeout.
        """


class RecvHandle(ABC):
    """A posted receive."""

    @abstractmethod
    def wait(self) -> Message:
        """Block until the message is here and checked; calling it again returns the same message.

        Raises:
            TransportError: naming channel, edge, layer, micro-batch, peer, bytes expected and had, where the
                peer died or sent something else.
            TransportTimeout: likewise, where nothing came within the timeout.
        """

    @abstractmethod
    def release(self) -> None:
        """Give the buffers back; the message's tensors must not be touched afterwards."""

    def take(self) -> Message:
        """``wait``, then a copy of the message, the buffers given back at once.

        Buffers are sized for the worst routing, messages are as large as they are: whoever keeps one (until a
        backward, say) keeps the latter.
        """
        received = self.wait()
        message = Message(received.header.clone(), tuple(section.clone() for section in received.sections))
        self.release()
        return message


class Transport(ABC):
    """Moves messages over the channels it was created with."""

    def __init__(self, channels: Sequence[ChannelSpec], *, timeout_seconds: float) -> None:
        if not (timeout_seconds > 0 and math.isfinite(timeout_seconds)):
            raise ValueError(f"timeout_seconds must be positive and finite, got {timeout_seconds}")
        names = [channel.name for channel in channels]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"channel names must be unique; {twice[0]!r} appears {names.count(twice[0])} times")
        self.timeout_seconds = timeout_seconds
        self.traffic: dict[str, ChannelTraffic] = {name: ChannelTraffic() for name in names}

    @property
    def bytes_sent(self) -> dict[str, int]:
        """Payload bytes this rank has sent, per channel name; headers apart (see ``traffic``)."""
        return {name: traffic.payload for name, traffic in self.traffic.items()}

    @abstractmethod
    def send(
        self, channel: ChannelSpec, key: TransferKey, peer: int, message: Message, spec: MessageSpec
    ) -> SendHandle:
        """Start sending ``message`` to global rank ``peer``; never blocks.

        The tensors must stay unchanged until the handle's ``wait`` returns; the transport keeps them alive.

        Raises:
            ValueError: where the message does not fit ``spec``, or ``spec`` is not the one that this channel
                and peer have carried so far.
            TransportError: where the connection is known to be lost, or an earlier send failed.
        """

    @abstractmethod
    def post_recv(self, channel: ChannelSpec, key: TransferKey, peer: int, spec: MessageSpec) -> RecvHandle:
        """Get ready to receive the next message of ``peer`` on ``channel``; never blocks.

        Raises:
            ValueError: where ``spec`` is not the one that this channel and peer have carried so far.
            TransportError: where the connection is known to be lost.
        """

    @abstractmethod
    def flush(self) -> None:
        """Wait for every send under way (at the end of a step).

        Raises:
            TransportError: where one failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free threads, buffers and connections; what is under way is dropped. Safe to call twice."""


def check_message(channel: ChannelSpec, key: TransferKey, message: Message, spec: MessageSpec) -> list[int]:
    """Check that ``message`` is what ``spec`` says and return the rows of each section.

    Raises:
        ValueError: naming the section with its numbers.
    """

    header, sections = message
    if header.dtype is not torch.int64 or header.shape != (spec.header_length,) or not header.is_cpu:
        raise _refused(channel, key, message, spec)
    rows = []
    if len(sections) != len(spec.plain):
        raise _refused(channel, key, message, spec)
    for tensor, (dtype, width, most, _, _) in zip(sections, spec.plain, strict=True):
        shape = tensor.shape
        if tensor.dtype is not dtype or len(shape) != 2 or shape[1] != width or shape[0] > most:
            raise _refused(channel, key, message, spec)
        rows.append(shape[0])
    return rows


def _refused(channel: ChannelSpec, key: TransferKey, message: Message, spec: MessageSpec) -> ValueError:
    """Why ``message`` does not fit ``spec``, in words."""

    def fail(what: str) -> ValueError:
        return ValueError(f"{channel.name}: cannot send {key}: {what}")

    header = message.header
    if header.dtype is not torch.int64 or header.shape != (spec.header_length,) or not header.is_cpu:
        return fail(
            f"the header must be int64 [{spec.header_length}] on the host, "
            f"got {header.dtype} {list(header.shape)} on {header.device}"
        )
    if len(message.sections) != len(spec.sections):
        return fail(f"{len(spec.sections)} sections expected, got {len(message.sections)}")
    for index, (tensor, section) in enumerate(zip(message.sections, spec.sections, strict=True)):
        shape = tensor.shape
        if tensor.dtype is not section.dtype or len(shape) != 2 or shape[1] != section.width:
            return fail(f"section {index} must be {section}, got {tensor.dtype} {list(shape)}")
        if shape[0] > section.max_rows:
            return fail(
                f"section {index} holds {shape[0]} rows, {shape[0] * section.row_bytes} bytes; "
                f"at most {section.max_rows} rows, {section.max_bytes} bytes, fit the receiver's buffer"
            )
    raise AssertionError("the message fits")


def check_same_spec(channel: ChannelSpec, peer: int, old: MessageSpec, new: MessageSpec) -> None:
    """Refuse a second spec between two ranks on one channel: buffers already posted are sized by the first.

    Raises:
        ValueError: with both specs.
    """
    if old is not new and old != new:
        raise ValueError(f"{channel.name}: messages with rank {peer} have been {old}; {new} needs a channel of its own")
