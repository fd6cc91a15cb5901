"""``per-node``: one copy of a token per node that holds any of its experts.

The copy goes to one FFN rank of the node, the *entry*, among those that hold an expert of the token (token ``t``
takes the ``t mod d``-th of its ``d`` ranks there, which spreads the load). The entry forwards the row to the
others, gets their partial sums, adds them up in fp32 and returns one sum a row. Against ``per-expert`` this moves
``k / E[distinct nodes of a token]`` times fewer hidden-state rows between nodes; what moves inside a node is counted
on the node's own channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_disagmoe.transport.base import Message, MessageSpec, Section
from megatron_disagmoe.transport.dispatch.base import CombineState, Dispatcher, DispatchSizes, ExpertInput
from megatron_disagmoe.transport.dispatch.gradients import no_header
from megatron_disagmoe.transport.dispatch.node import FAN_IN, FAN_OUT, NodeExchange
from megatron_disagmoe.transport.dispatch.rows import (
    concatenate,
    expand_rows,
    gather_parts,
    merge_pairs,
    route_rows,
    select_probs,
    sum_parts,
    sum_rows,
)


@dataclass(frozen=True)
class PerNodeExpertState:
    """What `PerNodeDispatcher.expert_output` needs.

    Attributes:
        exchange: of this stage; None where the node is one rank.
        row_of_input: int64 ``[R]``, which row of the node each expert input copies.
        part_rows: rows that each rank of the node forwarded to this one.
        row_of_forwarded: int64, which row received from attention each forwarded row is, all targets in order.
        rows: rows received from each attention rank.
    """

    exchange: NodeExchange | None
    row_of_input: torch.Tensor
    part_rows: list[int]
    row_of_forwarded: torch.Tensor
    rows: list[int]


class PerNodeDispatcher(Dispatcher):
    """One row per (token, node). FFN ranks ``n`` with equal ``n // ranks_per_node`` share a node.

    Raises:
        ValueError: where the FFN ranks do not fill whole nodes.
    """

    mode = "per-node"

    def __init__(self, sizes: DispatchSizes, *, ranks_per_node: int) -> None:
        super().__init__(sizes)
        self.node_size = min(ranks_per_node, sizes.num_ffn_ranks)
        if self.node_size < 1 or sizes.num_ffn_ranks % self.node_size:
            raise ValueError(
                f"{sizes.num_ffn_ranks} FFN ranks do not fill nodes of {ranks_per_node}; choose --af-ranks-per-node "
                f"among the divisors of --af-ffn-ranks, or --af-dispatch per-rank"
            )
        self.node_experts = self.node_size * sizes.num_local_experts

    def m2n_spec(self) -> MessageSpec:
        s = self.sizes
        max_pairs = s.num_tokens * min(s.topk, self.node_experts)
        return self._spec(self.node_experts, max_rows=s.num_tokens, max_pairs=max_pairs)

    def n2m_spec(self) -> MessageSpec:
        return self._sum_spec(self.sizes.num_tokens)

    def fan_out_spec(self) -> MessageSpec:
        """What one rank of a node forwards to another; header: pairs by local expert, then by attention rank."""
        s = self.sizes
        m = s.num_attention_ranks
        return self._spec(s.num_local_experts * m, max_rows=m * s.num_tokens, max_pairs=m * s.max_pairs)

    def fan_in_spec(self) -> MessageSpec:
        """The partial sums on their way back."""
        return self._sum_spec(self.sizes.num_attention_ranks * self.sizes.num_tokens)

    def _spec(self, header_length: int, *, max_rows: int, max_pairs: int) -> MessageSpec:
        s = self.sizes
        hidden = Section(s.dtype, s.hidden_size, max_rows, hidden=True)
        probs = Section(s.probs_dtype, 1, max_pairs)
        return MessageSpec(header_length, (hidden, probs, Section(torch.int32, 1, max_pairs, differentiable=False)))

    def _sum_spec(self, max_rows: int) -> MessageSpec:
        return MessageSpec(0, (Section(self.sizes.dtype, self.sizes.hidden_size, max_rows, hidden=True),))

    def dispatch(
        self, hidden: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[list[Message], CombineState]:
        self._check_tokens(hidden)
        s = self.sizes
        pairs = route_rows(routing_map)
        entry = self._entries(routing_map)
        # [N, T]: the row each token has in the message to each rank, where that rank is the entry of its node.
        row_of_token = entry.cumsum(dim=1, dtype=torch.int32) - 1
        entry_in_node = entry.view(-1, self.node_size, entry.shape[1]).int().argmax(dim=1)
        node = pairs.expert // self.node_experts
        entry_of_pair = node * self.node_size + entry_in_node[node, pairs.token]
        # Pairs by entry rank, each still by expert, then by token.
        order = entry_of_pair.argsort(stable=True)
        entry_of_pair = entry_of_pair[order]
        expert_in_node = pairs.expert[order] % self.node_experts
        slots = entry_of_pair * self.node_experts + expert_in_node
        counts = torch.bincount(slots, minlength=s.num_ffn_ranks * self.node_experts).cpu()
        counts = counts.view(s.num_ffn_ranks, self.node_experts)
        pairs_per_rank = counts.sum(dim=1).tolist()
        row = row_of_token[entry_of_pair, pairs.token[order]].unsqueeze(-1).split(pairs_per_rank)
        pair_probs = select_probs(probs, pairs)[order].unsqueeze(-1).split(pairs_per_rank)
        token_of_row = entry.nonzero(as_tuple=True)[1]
        tokens = gather_parts(hidden, token_of_row, entry.sum(dim=1).tolist())
        messages = [Message(counts[n], (tokens[n], pair_probs[n], row[n])) for n in range(s.num_ffn_ranks)]
        return messages, CombineState(token_of_row, hidden.shape[0])

    def _entries(self, routing_map: torch.Tensor) -> torch.Tensor:
        """bool ``[N, T]``: which rank is the entry of each node a token goes to."""
        s = self.sizes
        goes = routing_map.view(-1, s.num_ffn_ranks // self.node_size, self.node_size, s.num_local_experts).any(dim=3)
        choice = torch.arange(goes.shape[0], device=goes.device).view(-1, 1) % goes.sum(dim=2).clamp(min=1)
        entry = goes & (goes.cumsum(dim=2) - 1 == choice.unsqueeze(-1))
        return entry.view(-1, s.num_ffn_ranks).T

    def combine(self, received: list[Message], state: CombineState) -> torch.Tensor:
        assert state.token_of_row is not None
        return sum_parts([message.sections[0] for message in received], state.token_of_row, state.num_tokens)

    def expert_input(self, received: list[Message], exchange: NodeExchange | None = None) -> ExpertInput:
        if self.node_size > 1 and (exchange is None or exchange.size != self.node_size):
            raise ValueError(f"per-node dispatch needs the exchange of a node of {self.node_size} FFN ranks")
        rows = [message.sections[0].shape[0] for message in received]
        forwarded, row_of_forwarded = self._forward_rows(received, rows)
        parts = exchange.swap(FAN_OUT, forwarded, self.fan_out_spec()) if exchange is not None else forwarded
        part_rows = [part.sections[0].shape[0] for part in parts]
        tokens, probs, row_of_input = expand_rows(parts)
        per_expert = torch.stack([part.header for part in parts]).sum(dim=0)
        per_expert = per_expert.view(self.sizes.num_local_experts, -1).sum(dim=1)
        state = PerNodeExpertState(exchange, row_of_input, part_rows, row_of_forwarded, rows)
        return ExpertInput(tokens, per_expert, probs.squeeze(-1), state)

    def _forward_rows(self, received: list[Message], rows: list[int]) -> tuple[list[Message], torch.Tensor]:
        """One message per rank of the node, and which received row each of their rows is."""
        pair_row, pair_probs = merge_pairs(received)
        # Pairs are by expert of the node, then by attention rank, so each rank's experts are one block.
        blocks = torch.stack([message.header for message in received], dim=1).view(self.node_size, -1)
        sizes = blocks.sum(dim=1).tolist()
        indices, pair_rows = [], []
        for block in pair_row.split(sizes):
            needed = torch.zeros(sum(rows), dtype=torch.bool, device=block.device)
            needed[block] = True
            indices.append(needed.nonzero(as_tuple=True)[0])
            pair_rows.append((needed.cumsum(dim=0, dtype=torch.int32) - 1)[block].unsqueeze(-1))
        row_of_forwarded = torch.cat(indices)
        arrived = concatenate([message.sections[0] for message in received])
        parts = gather_parts(arrived, row_of_forwarded, [index.numel() for index in indices])
        sections = zip(parts, pair_probs.split(sizes), pair_rows, strict=True)
        return [Message(blocks[q], part) for q, part in enumerate(sections)], row_of_forwarded

    def expert_output(self, output: torch.Tensor, state: PerNodeExpertState) -> list[Message]:
        partial = sum_rows(output, state.row_of_input, sum(state.part_rows)).split(state.part_rows)
        returned = [Message(no_header(), (part,)) for part in partial]
        if state.exchange is not None:
            returned = state.exchange.swap(FAN_IN, returned, self.fan_in_spec())
        parts = [message.sections[0] for message in returned]
        total = sum_parts(parts, state.row_of_forwarded, sum(state.rows))
        return [Message(no_header(), (part,)) for part in total.split(state.rows)]
