"""What two ranks of the ``nixl`` transport say to each other, as bytes of notifications (see ``nixl_backend``)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from megatron_disagmoe.transport.base import MessageSpec

OFFER, ANNOUNCE, DATA, PING = b"O", b"A", b"D", b"P"
#: kind, channel number, sequence number
ENVELOPE = struct.Struct("<cIQ")
#: slot address, capacity, metadata generation, spec digest
OFFER_BODY = struct.Struct("<QQIQ")
#: payload bytes, spec digest; the header record follows
ANNOUNCE_BODY = struct.Struct("<QQ")
_ALIGN = 64


class Offer(NamedTuple):
    """A slot that its owner lets us write into."""

    address: int
    capacity: int
    generation: int


def envelope(kind: bytes, number: int, sequence: int) -> bytes:
    """How every notification begins: its kind, the channel's number and the message's on it."""
    return ENVELOPE.pack(kind, number, sequence)


def agent_name(rank: int, way: str) -> str:
    """The name of a rank's agent for one way (``nixl_agent``)."""
    return f"af-{rank}-{way}"


def agent_rank(name: str | bytes) -> int:
    """The rank in an agent's name."""
    text = name.decode() if isinstance(name, bytes) else name
    return int(text.split("-")[1])


def packed_offsets(spec: MessageSpec, rows: Sequence[int]) -> tuple[list[int], int]:
    """Where each section begins in the packed payload, and the payload's bytes (0 where every section is empty)."""
    offsets, offset = [], 0
    for section, count in zip(spec.sections, rows, strict=True):
        offsets.append(offset)
        offset += -(-count * section.row_bytes // _ALIGN) * _ALIGN
    return offsets, offset


def worst_case(spec: MessageSpec) -> int:
    """Bytes of the largest packed payload."""
    return packed_offsets(spec, [section.max_rows for section in spec.sections])[1]
