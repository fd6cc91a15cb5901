"""Bytes and rows sent, summed over channels of one kind and put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields

from megatron_disagmoe.transport.base import ChannelTraffic

#: Kinds of channel in the order they are reported: the first word of a channel's name.
KINDS = tuple(
    f"{edge}{suffix}" for edge in ("M2N", "N2M", "LANE", "AGAIN", "FANOUT", "FANIN") for suffix in ("", ".grad")
)
_COLUMNS = len(fields(ChannelTraffic))


def as_numbers(traffic: Mapping[str, ChannelTraffic]) -> list[int]:
    """Traffic by channel name as one list, the same length everywhere, so that ranks' lists can be added up."""
    totals = {kind: [0] * _COLUMNS for kind in KINDS}
    for name, channel in traffic.items():
        kind = name.split(maxsplit=1)[0]
        totals[kind] = [a + b for a, b in zip(totals[kind], astuple(channel), strict=True)]
    return [number for kind in KINDS for number in totals[kind]]


def from_numbers(numbers: Sequence[int]) -> dict[str, ChannelTraffic]:
    """Traffic by kind from such a list; kinds that sent nothing are left out."""
    rows = [numbers[i : i + _COLUMNS] for i in range(0, len(numbers), _COLUMNS)]
    return {kind: ChannelTraffic(*row) for kind, row in zip(KINDS, rows, strict=True) if any(row)}


def format_traffic(by_kind: Mapping[str, ChannelTraffic], *, steps: int) -> str:
    """``"M2N 131072 B, 512 rows | ... | total 540000 B: 524288 hidden, 10240 side, 5472 headers"`` a step."""
    parts = [
        f"{kind} {channel.payload // steps} B, {channel.hidden_rows // steps} rows" for kind, channel in by_kind.items()
    ]
    hidden, side, header = (
        sum(getattr(channel, name) for channel in by_kind.values()) // steps for name in ("hidden", "side", "header")
    )
    parts.append(f"total {hidden + side + header} B: {hidden} hidden, {side} side, {header} headers")
    return " | ".join(parts)
