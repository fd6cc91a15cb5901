"""``per-expert``: one copy of a token per expert it goes to, as Megatron's all-to-all dispatcher does.

Rows and sums keep the order of ``MoEAlltoAllTokenDispatcher`` with ``moe_permute_fusion`` off
(megatron/core/transformer/moe: ``permute``, ``sort_chunks_by_idxs``, ``unpermute``), so results are bit for bit
Megatron's on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_disagmoe.transport.base import Message, MessageSpec, Section
from megatron_disagmoe.transport.dispatch.base import Dispatcher, ExpertInput, no_header


@dataclass(frozen=True)
class PerExpertState:
    """``token_of_row``: int64 ``[rows]``, the token behind each row sent, all FFN ranks in order."""

    token_of_row: torch.Tensor
    num_tokens: int


@dataclass(frozen=True)
class PerExpertExpertState:
    """``counts[m][e]``: rows from attention rank ``m`` for local expert ``e``."""

    counts: list[list[int]]


class PerExpertDispatcher(Dispatcher):
    """One row per (token, expert); probabilities beside it."""

    mode = "per-expert"

    def m2n_spec(self) -> MessageSpec:
        s = self.sizes
        return MessageSpec(
            header_length=s.num_local_experts,
            sections=(
                Section(s.dtype, s.hidden_size, s.max_pairs, hidden=True),
                Section(s.probs_dtype, 1, s.max_pairs),
            ),
        )

    def n2m_spec(self) -> MessageSpec:
        s = self.sizes
        return MessageSpec(0, (Section(s.dtype, s.hidden_size, s.max_pairs, hidden=True),))

    def dispatch(
        self, hidden: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[list[Message], PerExpertState]:
        self._check_tokens(hidden)
        s = self.sizes
        rows = route_rows(routing_map)
        counts = rows.counts.view(s.num_ffn_ranks, s.num_local_experts)
        rows_per_rank = counts.sum(dim=1).tolist()
        tokens = hidden.index_select(0, rows.token).split(rows_per_rank)
        row_probs = select_probs(probs, rows).unsqueeze(-1).split(rows_per_rank)
        messages = [Message(counts[n], (tokens[n], row_probs[n])) for n in range(s.num_ffn_ranks)]
        return messages, PerExpertState(rows.token, hidden.shape[0])

    def combine(self, received: list[Message], state: PerExpertState) -> torch.Tensor:
        rows = concatenate([message.sections[0] for message in received])
        output = rows.new_zeros(state.num_tokens, rows.shape[1])
        if torch.are_deterministic_algorithms_enabled():
            return output.index_add(0, state.token_of_row, rows)
        return output.scatter_add(0, state.token_of_row.unsqueeze(1).expand_as(rows), rows)

    def expert_input(self, received: list[Message]) -> ExpertInput:
        counts = [message.header.tolist() for message in received]
        tokens = by_expert([message.sections[0] for message in received], counts)
        probs = by_expert([message.sections[1] for message in received], counts).squeeze(-1)
        per_expert = torch.stack([message.header for message in received]).sum(dim=0)
        return ExpertInput(tokens, per_expert, probs, PerExpertExpertState(counts))

    def expert_output(self, output: torch.Tensor, state: PerExpertExpertState) -> list[Message]:
        return [Message(no_header(), (rows,)) for rows in by_rank(output, state.counts)]


@dataclass(frozen=True)
class RoutedRows:
    """The (token, expert) pairs of a routing map, by expert, then by token.

    Attributes:
        token: int64 ``[rows]``.
        expert: int64 ``[rows]``.
        counts: int64 ``[E]`` on the host, rows of each expert.
    """

    token: torch.Tensor
    expert: torch.Tensor
    counts: torch.Tensor


def route_rows(routing_map: torch.Tensor) -> RoutedRows:
    """List the pairs of ``routing_map`` (bool ``[T, E]``) in Megatron's order."""
    expert, token = routing_map.T.nonzero(as_tuple=True)
    return RoutedRows(token, expert, routing_map.sum(dim=0).cpu())


def select_probs(probs: torch.Tensor, rows: RoutedRows) -> torch.Tensor:
    """``[rows]``: the probability of each pair, from ``probs`` ``[T, E]``."""
    return probs.reshape(-1).index_select(0, rows.token * probs.shape[1] + rows.expert)


def concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of all parts; no copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_expert(parts: list[torch.Tensor], counts: list[list[int]]) -> torch.Tensor:
    """Rows that each attention rank sorted by expert, merged: by expert, then by attention rank."""
    if len(parts) == 1:
        return parts[0]
    chunks = [part.split(sizes) for part, sizes in zip(parts, counts, strict=True)]
    return torch.cat([chunk[e] for e in range(len(counts[0])) for chunk in chunks])


def by_rank(rows: torch.Tensor, counts: list[list[int]]) -> list[torch.Tensor]:
    """Inverse of `by_expert`."""
    if len(counts) == 1:
        return [rows]
    num_experts, num_ranks = len(counts[0]), len(counts)
    chunks = rows.split([counts[m][e] for e in range(num_experts) for m in range(num_ranks)])
    return [concatenate(list(chunks[m::num_ranks])) for m in range(num_ranks)]
