"""The stronger rival: Megatron's expert parallelism with one copy of a token per expert-parallel rank.

What DeepEP does on GPUs, for this benchmark alone: Megatron's all-to-all dispatcher is replaced by one that sends each
token once to every rank with any of its experts, expert ids and probabilities beside it, and gets one partial sum back.
The arithmetic at both ends is AF-pipe's ``per-rank`` mode, so the two differ in who sends when, and in nothing else.

Shape legend: ``T`` tokens of a rank, ``h`` hidden size, ``E`` experts, ``W`` expert-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.training import get_args

from megatron_disagmoe import megatron_seams
from megatron_disagmoe.transport.base import Message
from megatron_disagmoe.transport.dispatch import create_dispatcher
from megatron_disagmoe.transport.dispatch.gradients import no_header

SYMBOL = "megatron.core.transformer.moe.moe_layer:MoEAlltoAllTokenDispatcher"


def install() -> None:
    """From now on ``--moe-token-dispatcher-type alltoall`` builds the rival's dispatcher."""
    megatron_seams.patch(SYMBOL, OneCopyTokenDispatcher)


class OneCopyTokenDispatcher(MoETokenDispatcher):
    """Sends one copy of a token per rank; the arguments are those of ``MoEAlltoAllTokenDispatcher``."""

    def __init__(
        self, num_local_experts: int, local_expert_indices: list[int], config: Any, pg_collection: Any = None
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        args = get_args()
        self._maths = create_dispatcher(
            "per-rank",
            num_tokens=args.micro_batch_size * args.seq_length,
            hidden_size=config.hidden_size,
            num_experts=config.num_moe_experts,
            topk=config.moe_router_topk,
            num_attention_ranks=self.ep_size,
            num_ffn_ranks=self.ep_size,
            dtype=args.params_dtype,
            probs_dtype=args.params_dtype,
        )

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One row per (token, rank), and per (token, expert) its probability and the row's number ``[pairs, 2]``."""
        self._shape = hidden_states.shape
        messages, self._combine_state = self._maths.dispatch(
            hidden_states.view(-1, self._shape[-1]), probs.to(hidden_states.dtype), routing_map
        )
        self._rows_out = [message.sections[0].shape[0] for message in messages]
        self._pairs_out = [message.sections[1].shape[0] for message in messages]
        rows = torch.tensor([[r] for r in self._rows_out], dtype=torch.int64)
        self._counts_out = torch.cat((torch.stack([message.header for message in messages]), rows), dim=1)
        beside = [torch.cat((m.sections[1], m.sections[2].to(m.sections[1].dtype)), dim=1) for m in messages]
        return torch.cat([message.sections[0] for message in messages]), torch.cat(beside)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts first, then rows, then what stands beside them."""
        counts = self._counts_out.to(hidden_states.device)
        self._counts_in = torch.empty_like(counts)
        dist.all_to_all_single(self._counts_in, counts, group=self.ep_group)
        self._counts_in = self._counts_in.cpu()
        self._rows_in = self._counts_in[:, -1].tolist()
        self._pairs_in = self._counts_in[:, :-1].sum(dim=1).tolist()
        tokens = all_to_all(self.ep_group, hidden_states, self._rows_in, self._rows_out)
        return tokens, all_to_all(self.ep_group, probs, self._pairs_in, self._pairs_out)

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows sorted by local expert, tokens per expert, probabilities."""
        parts = zip(
            self._counts_in, hidden_states.split(self._rows_in), probs.split(self._pairs_in), strict=True
        )
        received = [
            Message(counts[:-1], (tokens, beside[:, :1], beside[:, 1:].detach().to(torch.int32)))
            for counts, tokens, beside in parts
        ]
        work = self._maths.expert_input(received)
        self._expert_state = work.state
        return work.tokens, work.tokens_per_expert, work.probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Partial sums, one per row received."""
        results = self._maths.expert_output(hidden_states, self._expert_state)
        return torch.cat([message.sections[0] for message in results])

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Partial sums back to where their tokens came from."""
        combined: torch.Tensor = all_to_all(self.ep_group, hidden_states, self._rows_out, self._rows_in)
        return combined

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in the shape of the layer's input."""
        received = [Message(no_header(), (part,)) for part in hidden_states.split(self._rows_out)]
        return self._maths.combine(received, self._combine_state).view(self._shape)
