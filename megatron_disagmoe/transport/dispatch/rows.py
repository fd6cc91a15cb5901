"""Row arithmetic that the dispatch modes share: list pairs, gather rows, add rows up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_disagmoe.transport.base import Message

#: Elements converted to fp32 at a time while half-precision rows are added up.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class RoutedRows:
    """The (token, expert) pairs of a routing map, by expert, then by token.

    Attributes:
        token: int64 ``[pairs]``.
        expert: int64 ``[pairs]``.
        counts: int64 ``[E]`` on the host, pairs of each expert.
    """

    token: torch.Tensor
    expert: torch.Tensor
    counts: torch.Tensor


def route_rows(routing_map: torch.Tensor) -> RoutedRows:
    """List the pairs of ``routing_map`` (bool ``[T, E]``) in Megatron's order."""
    expert, token = routing_map.T.nonzero(as_tuple=True)
    return RoutedRows(token, expert, routing_map.sum(dim=0).cpu())


def select_probs(probs: torch.Tensor, rows: RoutedRows) -> torch.Tensor:
    """``[pairs]``: the probability of each pair, from ``probs`` ``[T, E]``."""
    return probs.reshape(-1).index_select(0, rows.token * probs.shape[1] + rows.expert)


def concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of all parts; no copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def interleave(parts: list[torch.Tensor], counts: list[list[int]]) -> torch.Tensor:
    """Rows that each of several sources sorted by expert, merged: by expert, then by source.

    Args:
        parts: one tensor per source.
        counts: ``counts[source][expert]`` rows.
    """
    if len(parts) == 1:
        return parts[0]
    chunks = [part.split(sizes) for part, sizes in zip(parts, counts, strict=True)]
    return torch.cat([chunk[e] for e in range(len(counts[0])) for chunk in chunks])


def deinterleave(rows: torch.Tensor, counts: list[list[int]]) -> list[torch.Tensor]:
    """Inverse of `interleave`."""
    if len(counts) == 1:
        return [rows]
    num_experts, num_sources = len(counts[0]), len(counts)
    chunks = rows.split([counts[s][e] for e in range(num_experts) for s in range(num_sources)])
    return [concatenate(list(chunks[s::num_sources])) for s in range(num_sources)]


def expand_rows(messages: list[Message]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What several sources sent as rows shared by (token, expert) pairs, one row a pair: by expert, then by source.

    Args:
        messages: one per source: its header counts pairs by expert; its sections are rows, and probability and row
            number of each pair.

    Returns:
        tokens ``[pairs, h]``, probabilities ``[pairs, 1]``, and which of all sources' rows each pair copies.
    """
    row_of_pair, probs = merge_pairs(messages)
    return gather_rows(concatenate([message.sections[0] for message in messages]), row_of_pair), probs, row_of_pair


def merge_pairs(messages: list[Message]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of such messages by expert, then by source: number among all sources' rows, and probability."""
    counts = [message.header.tolist() for message in messages]
    numbers, start = [], 0
    for message in messages:
        numbers.append(message.sections[2].squeeze(-1) + start)
        start += message.sections[0].shape[0]
    return interleave(numbers, counts).long(), interleave([message.sections[1] for message in messages], counts)


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows[index]``; its gradient adds up in fp32 (see `sum_rows`)."""
    return gather_parts(rows, index, [index.numel()])[0]


def gather_parts(rows: torch.Tensor, index: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """``rows[index]`` in parts of ``sizes`` rows, each a tensor of its own; the gradient is `sum_parts`."""
    parts: tuple[torch.Tensor, ...] = _Gather.apply(rows, index, sizes)
    return parts


def sum_rows(rows: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``[num_rows, width]``: output row ``i`` is the sum of ``rows[j]`` with ``index[j] == i``.

    Half-precision rows add up in fp32 and are rounded once. The gradient is `gather_rows`.
    """
    return sum_parts([rows], index, num_rows)


def sum_parts(parts: list[torch.Tensor], index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`sum_rows` of rows in several tensors, in order; they are never put together. The gradient is `gather_parts`."""
    total: torch.Tensor = _Sum.apply(index, num_rows, *parts)
    return total


def _add_up(parts: Sequence[torch.Tensor], index: torch.Tensor, num_rows: int) -> torch.Tensor:
    first = parts[0]
    indices = index.split([part.shape[0] for part in parts])
    if first.dtype.itemsize >= 4:
        total = first.new_zeros(num_rows, first.shape[1])
        for part, rows in zip(parts, indices, strict=True):
            total.index_add_(0, rows, part)
        return total
    total = torch.zeros(num_rows, first.shape[1], dtype=torch.float32, device=first.device)
    for part, rows in zip(parts, indices, strict=True):
        # A whole copy in fp32 would cost more than the additions (fresh pages), so convert a few rows at a time.
        step = max(1, _CHUNK_ELEMENTS // part.shape[1]) if part.device.type == "cpu" else max(1, part.shape[0])
        for start in range(0, part.shape[0], step):
            total.index_add_(0, rows[start : start + step], part[start : start + step].float())
    return total.to(first.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return tuple(rows.index_select(0, part) for part in index.split(sizes))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _add_up(gradients, index, ctx.num_rows), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: torch.Tensor, num_rows: int, *parts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.sizes = [part.shape[0] for part in parts]
        return _add_up(parts, index, num_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return None, None, *(gradients[0].index_select(0, part) for part in index.split(ctx.sizes))
