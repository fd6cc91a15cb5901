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

#: What numpy has of torch's dtypes; bf16 and fp8 it has not.
_NUMPY = {
    dtype: np.dtype(str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8)
}


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
    def _first_word(self) -> int:
        """Of the message's own header."""
        return _PREFIX + len(self.spec.sections)

    @cached_property
    def _start(self) -> int:
        """Of the riders, in bytes."""
        return self.num_words * 8

    @cached_property
    def _riding(self) -> tuple[tuple[int, int, int, torch.dtype, np.dtype | None], ...]:
        """Of every rider: index, bytes of a row, width, dtype, and numpy's for it where it has one."""
        sections = self.spec.sections
        return tuple(
            (i, sections[i].row_bytes, sections[i].width, sections[i].dtype, _NUMPY.get(sections[i].dtype))
            for i in self.riders
        )

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
        size, places = self._start, []
        for i, row_bytes, _, _, _ in self._riding:
            count = rows[i] * row_bytes
            if count:
                places.append((i, size, count))
                size += _align(count)
        memory = np.empty(size, np.uint8)
        edge, gradient, layer, micro_batch = key
        header = message.header.tolist() if self.spec.header_length else ()
        self._words.pack_into(
            memory, 0, _MAGIC, sequence, encode_edge(edge), gradient, layer, micro_batch, *rows, *header
        )
        record = torch.from_numpy(memory)
        start = record.data_ptr()
        for i, offset, count in places:
            source = message.sections[i].contiguous()
            ctypes.memmove(start + offset, source.data_ptr(), count)  # a quarter of what three torch calls take
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
        memory = record.numpy()  # it keeps the record alive, and so does what is made of it
        words = self._words.unpack_from(memory)
        edge, gradient, layer, micro_batch = key
        if words[:_PREFIX] != (_MAGIC, sequence, encode_edge(edge), gradient, layer, micro_batch):
            raise self._another(where, key, sequence, words)
        rows = list(words[_PREFIX : self._first_word])
        for count, (_, _, most, _, _) in zip(rows, self.spec.plain, strict=True):
            if not 0 <= count <= most:
                raise self._too_large(where, rows)
        header, *sections = self._nothing
        length = self.spec.header_length
        if length:
            header = torch.from_numpy(np.ndarray(length, np.int64, memory, self._first_word * 8))
        offset = self._start
        for i, row_bytes, width, dtype, numpy_dtype in self._riding:
            count = rows[i] * row_bytes
            if count:
                if numpy_dtype is not None:  # half of what the two torch calls take
                    sections[i] = torch.from_numpy(np.ndarray((rows[i], width), numpy_dtype, memory, offset))
                else:
                    flat = torch.frombuffer(memory, dtype=dtype, count=rows[i] * width, offset=offset)
                    sections[i] = flat.view(rows[i], width)
                offset += _align(count)
        return Message(header, tuple(sections)), rows

    def _another(self, where: Where, key: TransferKey, sequence: int, words: tuple[int, ...]) -> TransportError:
        """The words are not those of the message expected."""
        if words[0] != _MAGIC:
            return TransportError(
                f"{where}: expected a header record of {self.record_bytes} bytes at most, had garbage"
            )
        had = TransferKey(decode_edge(words[2]), bool(words[3]), words[4], words[5])
        return TransportError(f"{where}: expected message {sequence}, {key}; had message {words[1]}, {had}")

    def _too_large(self, where: Where, rows: list[int]) -> TransportError:
        """The first section that has more rows than it may, or less than none."""
        sections = self.spec.sections
        i = next(i for i, count in enumerate(rows) if not 0 <= count <= sections[i].max_rows)
        return TransportError(
            f"{where}: section {i} is {sections[i]}: expected at most {sections[i].max_bytes} bytes, "
            f"had {rows[i] * sections[i].row_bytes} ({rows[i]} rows)"
        )


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
