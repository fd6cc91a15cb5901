"""Messages that carry gradients back: what they look like, and the header that they and answers have not."""

from __future__ import annotations

import torch

from megatron_disagmoe.transport.base import MessageSpec


def gradient_spec(spec: MessageSpec) -> MessageSpec:
    """Spec of the message that carries the gradients of ``spec``'s differentiable sections back."""
    sections = tuple(section for section in spec.sections if section.differentiable)
    return MessageSpec(header_length=0, sections=sections)


_NO_HEADER = torch.empty(0, dtype=torch.int64)  # one for all: it holds nothing that could be written to


def no_header() -> torch.Tensor:
    """The header of a message whose spec has none."""
    return _NO_HEADER
