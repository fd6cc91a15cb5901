"""``per-expert``: one copy of a token per expert it goes to, as Megatron's all-to-all dispatcher does.

Rows and sums keep the order of ``MoEAlltoAllTokenDispatcher`` with ``moe_permute_fusion`` off
(megatron/core/transformer/moe: ``permute``, ``sort_chunks_by_idxs``, ``unpermute``), so results are bit for bit
Megatron's on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_disagmoe.transport.base import Message, MessageSpec, Section
from megatron_disagmoe.transport.dispatch.base import CombineState, Dispatcher, ExpertInput
from megatron_disagmoe.transport.dispatch.gradients import no_header
from megatron_disagmoe.transport.dispatch.node import NodeExchange
from megatron_disagmoe.transport.dispatch.rows import concatenate, deinterleave, interleave, route_rows, select_probs


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
    ) -> tuple[list[Message], CombineState]:
        self._check_tokens(hidden)
        s = self.sizes
        rows = route_rows(routing_map)
        counts = rows.counts.view(s.num_ffn_ranks, s.num_local_experts)
        rows_per_rank = counts.sum(dim=1).tolist()
        tokens = hidden.index_select(0, rows.token).split(rows_per_rank)
        row_probs = select_probs(probs, rows).unsqueeze(-1).split(rows_per_rank)
        messages = [Message(counts[n], (tokens[n], row_probs[n])) for n in range(s.num_ffn_ranks)]
        return messages, CombineState(rows.token, hidden.shape[0])

    def combine(self, received: list[Message], state: CombineState) -> torch.Tensor:
        assert state.token_of_row is not None
        rows = concatenate([message.sections[0] for message in received])
        output = rows.new_zeros(state.num_tokens, rows.shape[1])
        if torch.are_deterministic_algorithms_enabled():
            return output.index_add(0, state.token_of_row, rows)
        return output.scatter_add(0, state.token_of_row.unsqueeze(1).expand_as(rows), rows)

    def expert_input(self, received: list[Message], exchange: NodeExchange | None = None) -> ExpertInput:
        counts = [message.header.tolist() for message in received]
        tokens = interleave([message.sections[0] for message in received], counts)
        probs = interleave([message.sections[1] for message in received], counts).squeeze(-1)
        per_expert = torch.stack([message.header for message in received]).sum(dim=0)
        return ExpertInput(tokens, per_expert, probs, PerExpertExpertState(counts))

    def expert_output(self, output: torch.Tensor, state: PerExpertExpertState) -> list[Message]:
        return [Message(no_header(), (rows,)) for rows in deinterleave(output, state.counts)]
