"""The lane as a message: residual, shared experts' output and what combining needs, from A(i) to A(i+1).

Shape legend: ``s`` sequence, ``b`` micro-batch, ``h`` hidden, ``T = s*b``, ``k`` top-k.
"""

from __future__ import annotations

import functools

import torch

from megatron_disagmoe.model.stages import Lane
from megatron_disagmoe.transport.base import Message, MessageSpec, Section
from megatron_disagmoe.transport.dispatch import CombineState, DispatchSizes, gradient_spec

_HEADER = 3  # s, b, and the rows of token_of_row (-1: the rows are the tokens)


def lane_spec(sizes: DispatchSizes, *, shared: bool) -> MessageSpec:
    """Residual ``[T, h]``, shared output ``[T, h]`` where there are shared experts, token of each row ``[T*k, 1]``."""
    hidden = Section(sizes.dtype, sizes.hidden_size, sizes.num_tokens, hidden=True)
    rows = Section(torch.int64, 1, sizes.num_tokens * sizes.topk, differentiable=False)
    return MessageSpec(_HEADER, (hidden, hidden, rows) if shared else (hidden, rows))


def lane_grad_spec(sizes: DispatchSizes, *, shared: bool) -> MessageSpec:
    """Gradients of residual and shared output."""
    return gradient_spec(lane_spec(sizes, shared=shared))


def pack(lane: Lane) -> Message:
    """The message of a lane; detached."""
    s, b, h = lane.residual.shape
    rows = lane.routing.token_of_row
    header = _header(s, b, -1 if rows is None else rows.shape[0])
    token_of_row = torch.empty(0, 1, dtype=torch.int64) if rows is None else rows.unsqueeze(1)
    hidden = tuple(tensor.detach().reshape(s * b, h) for tensor in lane.tensors())
    return Message(header, (*hidden, token_of_row.to(lane.residual.device)))


@functools.lru_cache(maxsize=256)
def _header(s: int, b: int, rows: int) -> torch.Tensor:
    """Shared by messages: nobody writes to a header."""
    return torch.tensor([s, b, rows], dtype=torch.int64)


def unpack(message: Message) -> Lane:
    """The lane of a message."""
    s, b, rows = message.header.tolist()
    *hidden, token_of_row = message.sections
    shaped = [tensor.view(s, b, -1) for tensor in hidden]
    state = CombineState(None if rows < 0 else token_of_row.squeeze(1), s * b)
    return Lane(shaped[0], shaped[1] if len(shaped) > 1 else None, state)
