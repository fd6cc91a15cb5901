"""Row arithmetic that the dispatch modes share: list pairs, gather rows, add rows up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows[index]``; its gradient adds up in fp32 (see `sum_rows`)."""
    return _Gather.apply(rows, index)


def sum_rows(rows: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``[num_rows, width]``: output row ``i`` is the sum of ``rows[j]`` with ``index[j] == i``.

    Half-precision rows add up in fp32 and are rounded once. The gradient is `gather_rows`.
    """
    return _Sum.apply(rows, index, num_rows)


def _add_up(rows: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    if rows.dtype.itemsize >= 4:
        return rows.new_zeros(num_rows, rows.shape[1]).index_add_(0, index, rows)
    total = torch.zeros(num_rows, rows.shape[1], dtype=torch.float32, device=rows.device)
    # A whole copy in fp32 would cost more than the additions (fresh pages), so convert a few rows at a time.
    step = max(1, _CHUNK_ELEMENTS // rows.shape[1]) if rows.device.type == "cpu" else max(1, rows.shape[0])
    for start in range(0, rows.shape[0], step):
        total.index_add_(0, index[start : start + step], rows[start : start + step].float())
    return total.to(rows.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        return _add_up(gradients[0], index, ctx.num_rows), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(index)
        return _add_up(rows, index, num_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradients[0].index_select(0, index), None, None
