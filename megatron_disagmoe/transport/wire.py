"""How a message looks on the wire, shared by the back ends.

Before the first message of a pair of ranks on a channel goes a *hello*: the sender's idea of the message
spec. The receiver compares it with its own before any payload may land in a buffer sized by that spec,
so two ranks with different settings end with a message instead of with overwritten memory.

Then each message is one *header record* followed by its bodies:

    words   int64 [PREFIX + sections + header_length]: magic, sequence number, transfer key, rows of each
            section, the message's own header
    riders  narrow sections (probabilities, ids) and small ones packed behind the words, 8-byte aligned
    bodies  the others, each a piece of memory of its own that nobody has to copy
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from megatron_disagmoe.transport.base import ChannelSpec, Message, MessageSpec, Section, TransferKey, TransportError

_MAGIC = 0x4146_5049_5045_0001
_PREFIX = 6
#: Sections with narrower rows (hidden states apart), and any that is small even at its largest, ride in the header
#: record: a copy is cheaper than a message.
_BODY_ROW_BYTES = 256
_BODY_BYTES = 32 << 10
HELLO_WORDS = 4


def _align(size: int) -> int:
    return -(-size // 8) * 8


@lru_cache(maxsize=64)
def encode_edge(edge: str) -> int:
    """An edge's name as an integer (7 ASCII characters at most)."""
    raw = edge.encode("ascii")
    if len(raw) > 7:
        raise ValueError(f"edge name {edge!r} is longer than 7 characters")
    return int.from_bytes(raw, "little")


def decode_edge(code: int) -> str:
    """Inverse of `encode_edge`; for error messages, so never raises."""
    return int(code).to_bytes(8, "little", signed=True).rstrip(b"\0").decode("ascii", "replace")


@dataclass(frozen=True)
class Layout:
    """Sizes derived from a spec; the same on both ends.

    Attributes:
        spec: what it was derived from.
        riders: indices of the sections in the header record.
        bodies: indices of the sections that travel on their own.
        num_words: int64 words of the header record.
        record_bytes: header record's worst case, riders included.
    """

    spec: MessageSpec
    riders: tuple[int, ...]
    bodies: tuple[int, ...]
    num_words: int
    record_bytes: int

    @classmethod
    def of(cls, spec: MessageSpec, *, on_host: bool) -> Layout:
        """Layout of ``spec``; nothing rides where sections live on a device (a rider would be a blocking copy)."""
        sections = range(len(spec.sections))
        riders = tuple(i for i in sections if on_host and _rides(spec.sections[i]))
        num_words = _PREFIX + len(spec.sections) + spec.header_length
        record = num_words * 8 + sum(_align(spec.sections[i].max_bytes) for i in riders)
        return cls(spec, riders, tuple(i for i in sections if i not in riders), num_words, record)

    @cached_property
    def _nothing(self) -> tuple[torch.Tensor, ...]:
        """Header and sections of an empty message, shared by all: they hold nothing that could be written to."""
        sections = (torch.empty(0, section.width, dtype=section.dtype) for section in self.spec.sections)
        return torch.empty(0, dtype=torch.int64), *sections

    @cached_property
    def _words(self) -> struct.Struct:
        return struct.Struct(f"={self.num_words}q")

    @cached_property
    def digest(self) -> int:
        """A 56-bit digest of the spec: equal on both ends where their settings are."""
        text = repr((self.spec, self.riders)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")

    def hello(self) -> torch.Tensor:
        """int64 ``[HELLO_WORDS]``: magic, digest of the spec, header record's and bodies' largest size."""
        bodies = sum(self.spec.sections[i].max_bytes for i in self.bodies)
        return torch.tensor([_MAGIC, self.digest, self.record_bytes, bodies], dtype=torch.int64)

    def check_hello(self, where: Where, hello: torch.Tensor) -> None:
        """Compare a peer's hello with our own.

        Raises:
            TransportError: with both sizes where they differ.
        """
        mine = self.hello()
        if not torch.equal(mine, hello):
            theirs = hello.tolist()
            raise TransportError(
                f"{where}: the peer sends messages of another shape: expected at most {self.record_bytes} header "
                f"and {int(mine[3])} payload bytes ({self.spec}), had at most {theirs[2]} and {theirs[3]} bytes; "
                f"start every rank with the same sizes"
            )

    def pack(self, key: TransferKey, sequence: int, message: Message, rows: list[int]) -> torch.Tensor:
        """The header record of ``message``: uint8 ``[<= record_bytes]``."""
        spec = self.spec
        size = self.num_words * 8 + sum(_align(rows[i] * spec.sections[i].row_bytes) for i in self.riders)
        memory = np.empty(size, np.uint8)
        header = message.header.tolist() if spec.header_length else ()
        edge = encode_edge(key.edge)
        self._words.pack_into(
            memory, 0, _MAGIC, sequence, edge, key.gradient, key.layer, key.micro_batch, *rows, *header
        )
        record = torch.from_numpy(memory)
        target = record.data_ptr() + self.num_words * 8
        for i in self.riders:
            count = rows[i] * spec.sections[i].row_bytes
            if count:
                source = message.sections[i].contiguous()
                ctypes.memmove(target, source.data_ptr(), count)  # a quarter of what three torch calls take
            target += _align(count)
        return record

    def unpack(self, where: Where, key: TransferKey, sequence: int, record: torch.Tensor) -> tuple[Message, list[int]]:
        """Read a header record: the message with its riders (empty tensors for bodies) and each section's rows.

        Args:
            where: begins every error message.
            key: what was expected.
            sequence: number of the message on this pair, from 0.
            record: uint8, at least the record's size; the message's tensors are views of it.

        Raises:
            TransportError: where it is not the message expected, or its sizes do not fit the spec.
        """
        spec = self.spec
        memory = record.numpy()
        words = self._words.unpack_from(memory)
        prefix = words[:_PREFIX]
        expected = (_MAGIC, sequence, encode_edge(key.edge), key.gradient, key.layer, key.micro_batch)
        if prefix[0] != _MAGIC:
            raise TransportError(f"{where}: expected a header record of {self.record_bytes} bytes at most, had garbage")
        if prefix != expected:
            had = TransferKey(decode_edge(prefix[2]), bool(prefix[3]), prefix[4], prefix[5])
            raise TransportError(f"{where}: expected message {sequence}, {key}; had message {prefix[1]}, {had}")
        rows = list(words[_PREFIX : _PREFIX + len(spec.sections)])
        for i, (section, count) in enumerate(zip(spec.sections, rows, strict=True)):
            if not 0 <= count <= section.max_rows:
                raise TransportError(
                    f"{where}: section {i} is {section}: expected at most {section.max_bytes} bytes, "
                    f"had {count * section.row_bytes} ({count} rows)"
                )
        header, *sections = self._nothing
        if spec.header_length:
            start = (_PREFIX + len(spec.sections)) * 8
            header = torch.frombuffer(memory, dtype=torch.int64, count=spec.header_length, offset=start)
        offset = self.num_words * 8
        for i in self.riders:
            section = spec.sections[i]
            count = rows[i] * section.row_bytes
            if count:
                numbers = rows[i] * section.width
                flat = torch.frombuffer(memory, dtype=section.dtype, count=numbers, offset=offset)
                sections[i] = flat.view(rows[i], section.width)
            offset += _align(count)
        return Message(header, tuple(sections)), rows


def _rides(section: Section) -> bool:
    is_narrow = not section.hidden and section.row_bytes < _BODY_ROW_BYTES
    return is_narrow or section.max_bytes <= _BODY_BYTES


def view_section(buffer: torch.Tensor, spec: MessageSpec, index: int, rows: int) -> torch.Tensor:
    """The first bytes of a uint8 ``buffer`` as section ``index`` with ``rows`` rows.

    The buffer is whole elements of the section's dtype.
    """
    section = spec.sections[index]
    typed = buffer.view(section.dtype)
    return typed.as_strided((rows, section.width), (section.width, 1), typed.storage_offset())


class Where(NamedTuple):
    """One end of a transfer; as text it begins every error. Made for every message, so text only when asked for."""

    channel: ChannelSpec
    key: TransferKey
    me: int
    peer: int
    receiving: bool

    def __str__(self) -> str:
        """``"M2N A0->F1 r0: rank 3 receiving M2N of layer 2, micro-batch 7 from rank 1"``."""
        verb, word = ("receiving", "from") if self.receiving else ("sending", "to")
        return f"{self.channel.name}: rank {self.me} {verb} {self.key} {word} rank {self.peer}"


def place(channel: ChannelSpec, key: TransferKey, *, me: int, peer: int, receiving: bool) -> Where:
    """Where an error happened."""
    return Where(channel, key, me, peer, receiving)
