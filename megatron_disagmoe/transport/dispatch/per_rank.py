"""``per-rank``: one copy of a token per FFN rank that holds any of its experts.

The expert ids and probabilities of a token travel beside its row; the FFN rank copies the row for each of its
experts, adds the outputs up (in fp32) and returns one partial sum a row. Against ``per-expert`` this moves
``k / E[distinct FFN ranks of a token]`` times fewer hidden-state rows, ``k`` times fewer at N = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_disagmoe.transport.base import Message, MessageSpec, Section
from megatron_disagmoe.transport.dispatch.base import CombineState, Dispatcher, ExpertInput
from megatron_disagmoe.transport.dispatch.gradients import no_header
from megatron_disagmoe.transport.dispatch.node import NodeExchange
from megatron_disagmoe.transport.dispatch.rows import (
    expand_rows,
    gather_parts,
    route_rows,
    select_probs,
    sum_parts,
    sum_rows,
)


@dataclass(frozen=True)
class PerRankExpertState:
    """``row_of_input``: int64 ``[R]``, which received row each expert input copies; ``rows``: per attention rank."""

    row_of_input: torch.Tensor
    rows: list[int]


class PerRankDispatcher(Dispatcher):
    """One row per (token, FFN rank); probabilities and row numbers of the (token, expert) pairs beside it."""

    mode = "per-rank"

    def m2n_spec(self) -> MessageSpec:
        s = self.sizes
        return MessageSpec(
            header_length=s.num_local_experts,
            sections=(
                Section(s.dtype, s.hidden_size, s.num_tokens, hidden=True),
                Section(s.probs_dtype, 1, s.max_pairs),
                Section(torch.int32, 1, s.max_pairs, differentiable=False),
            ),
        )

    def n2m_spec(self) -> MessageSpec:
        s = self.sizes
        return MessageSpec(0, (Section(s.dtype, s.hidden_size, s.num_tokens, hidden=True),))

    def dispatch(
        self, hidden: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[list[Message], CombineState]:
        self._check_tokens(hidden)
        s = self.sizes
        pairs = route_rows(routing_map)
        counts = pairs.counts.view(s.num_ffn_ranks, s.num_local_experts)
        pairs_per_rank = counts.sum(dim=1).tolist()
        # [N, T]: which ranks a token goes to, and the row it has in that rank's message.
        goes = routing_map.view(-1, s.num_ffn_ranks, s.num_local_experts).any(dim=2).T
        row_of_token = goes.cumsum(dim=1, dtype=torch.int32) - 1
        row = row_of_token[pairs.expert // s.num_local_experts, pairs.token].unsqueeze(-1).split(pairs_per_rank)
        token_of_row = goes.nonzero(as_tuple=True)[1]
        rows_per_rank = goes.sum(dim=1).tolist()
        if s.num_ffn_ranks == 1 and rows_per_rank[0] == hidden.shape[0]:
            tokens: tuple[torch.Tensor, ...] = (hidden.view_as(hidden),)
            state = CombineState(None, hidden.shape[0])
        else:
            tokens = gather_parts(hidden, token_of_row, rows_per_rank)
            state = CombineState(token_of_row, hidden.shape[0])
        pair_probs = select_probs(probs, pairs).unsqueeze(-1).split(pairs_per_rank)
        messages = [Message(counts[n], (tokens[n], pair_probs[n], row[n])) for n in range(s.num_ffn_ranks)]
        return messages, state

    def combine(self, received: list[Message], state: CombineState) -> torch.Tensor:
        rows = [message.sections[0] for message in received]
        return rows[0] if state.token_of_row is None else sum_parts(rows, state.token_of_row, state.num_tokens)

    def expert_input(self, received: list[Message], exchange: NodeExchange | None = None) -> ExpertInput:
        rows = [message.sections[0].shape[0] for message in received]
        tokens, probs, row_of_input = expand_rows(received)
        per_expert = torch.stack([message.header for message in received]).sum(dim=0)
        return ExpertInput(tokens, per_expert, probs.squeeze(-1), PerRankExpertState(row_of_input, rows))

    def expert_output(self, output: torch.Tensor, state: PerRankExpertState) -> list[Message]:
        partial = sum_rows(output, state.row_of_input, sum(state.rows))
        return [Message(no_header(), (part,)) for part in partial.split(state.rows)]
