"""Hidden-state rows in fewer bytes while they are under way (``--af-wire-dtype``).

    same   as computed
    bf16   rounded to bfloat16
    fp8    float8_e4m3fn with one fp32 scale a row (the row's largest magnitude becomes 448, the format's largest)

Only what travels between attention and FFN ranks changes: rows are rounded when they are sent and are back in the
dtype of the computation when they are taken out of the transport's buffers. Gradients pass as if nothing had been
rounded (straight-through) and travel in the same format. Probabilities, ids and counts are left alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_disagmoe.transport.base import Message, MessageSpec, RecvHandle, Section

#: Names that `create_wire_format` knows.
WIRE_DTYPES = ("same", "bf16", "fp8")

_FP8 = torch.float8_e4m3fn
_FP8_LARGEST = torch.finfo(_FP8).max


class WireFormat:
    """``same``: messages travel as they are."""

    def spec(self, spec: MessageSpec) -> MessageSpec:
        """What travels for messages of ``spec``."""
        return spec

    def encode(self, message: Message, spec: MessageSpec) -> Message:
        """What is sent for ``message`` of ``spec``; detached from autograd."""
        return message

    def take(self, handle: RecvHandle, spec: MessageSpec) -> Message:
        """Wait for a message of ``self.spec(spec)`` and return it as one of ``spec``, the caller's to keep."""
        return handle.take()


class Bf16Format(WireFormat):
    """Hidden-state rows as bfloat16; nothing changes where they are computed in it."""

    def spec(self, spec: MessageSpec) -> MessageSpec:
        sections = tuple(replace(s, dtype=torch.bfloat16) if s.hidden else s for s in spec.sections)
        return replace(spec, sections=sections)

    def encode(self, message: Message, spec: MessageSpec) -> Message:
        pairs = zip(message.sections, spec.sections, strict=True)
        sections = tuple(t.detach().to(torch.bfloat16) if section.hidden else t for t, section in pairs)
        return Message(message.header, sections)

    def take(self, handle: RecvHandle, spec: MessageSpec) -> Message:
        received = handle.wait()
        pairs = list(zip(received.sections, spec.sections, strict=True))
        if all(tensor.dtype == section.dtype for tensor, section in pairs):
            return handle.take()  # computed in bfloat16: nothing to convert, so nothing to copy
        message = Message(received.header.clone(), tuple(t.to(section.dtype, copy=True) for t, section in pairs))
        handle.release()
        return message


class Fp8Format(WireFormat):
    """Hidden-state rows as float8_e4m3fn; their scales ``[rows, 1]`` follow the other sections, in order.

    A row that holds an infinity or a NaN arrives as NaNs and infinities, so a loss scaler still sees it.
    """

    def spec(self, spec: MessageSpec) -> MessageSpec:
        sections = tuple(replace(s, dtype=_FP8) if s.hidden else s for s in spec.sections)
        scales = tuple(Section(torch.float32, 1, s.max_rows, differentiable=False) for s in spec.sections if s.hidden)
        return replace(spec, sections=(*sections, *scales))

    def encode(self, message: Message, spec: MessageSpec) -> Message:
        sections, scales = [], []
        for tensor, section in zip(message.sections, spec.sections, strict=True):
            if section.hidden:
                rows = tensor.detach().float()
                largest = rows.abs().amax(dim=1, keepdim=True)
                scale = largest.clamp(min=torch.finfo(torch.float32).tiny * _FP8_LARGEST) / _FP8_LARGEST
                sections.append((rows / scale).to(_FP8))
                scales.append(scale)
            else:
                sections.append(tensor)
        return Message(message.header, (*sections, *scales))

    def take(self, handle: RecvHandle, spec: MessageSpec) -> Message:
        received = handle.wait()
        scales = iter(received.sections[len(spec.sections) :])
        sections = tuple(
            (tensor.float() * next(scales)).to(section.dtype) if section.hidden else tensor.clone()
            for tensor, section in zip(received.sections[: len(spec.sections)], spec.sections, strict=True)
        )
        message = Message(received.header.clone(), sections)
        handle.release()
        return message


def create_wire_format(name: str) -> WireFormat:
    """The format that ``--af-wire-dtype`` names.

    Raises:
        ValueError: for an unknown name.
    """
    formats: dict[str, type[WireFormat]] = {"same": WireFormat, "bf16": Bf16Format, "fp8": Fp8Format}
    if name not in formats:
        raise ValueError(f"unknown wire dtype {name!r}; choose from {', '.join(WIRE_DTYPES)}")
    return formats[name]()
