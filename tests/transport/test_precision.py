"""Rows in fewer bytes on the wire: sizes, rounding, what must pass unharmed."""

from __future__ import annotations

import pytest
import torch

from megatron_disagmoe.transport.base import (
    ChannelSpec,
    Message,
    MessageSpec,
    RecvHandle,
    Section,
    TransferKey,
    check_message,
)
from megatron_disagmoe.transport.precision import WIRE_DTYPES, WireFormat, create_wire_format

CHANNEL, KEY = ChannelSpec("M2N A0->F0 r0", (0,), (1,)), TransferKey("M2N", False, 0, 0)


class Arrived(RecvHandle):
    """A message that is here; its buffers are overwritten when they go back, as the next message would."""

    def __init__(self, message: Message) -> None:
        self.message = message

    def wait(self) -> Message:
        return self.message

    def release(self) -> None:
        for tensor in (self.message.header, *self.message.sections):
            tensor.copy_(torch.zeros_like(tensor))


def spec_of(dtype: torch.dtype) -> MessageSpec:
    return MessageSpec(
        1,
        (
            Section(dtype, 32, 16, hidden=True),
            Section(torch.float32, 1, 64),
            Section(torch.int32, 1, 64, differentiable=False),
        ),
    )


def message_of(rows: torch.Tensor) -> Message:
    pairs = 2 * len(rows)
    probs = torch.rand(pairs, 1, generator=torch.Generator().manual_seed(1))
    return Message(torch.tensor([len(rows)]), (rows, probs, torch.arange(pairs, dtype=torch.int32).unsqueeze(1)))


def through(wire: WireFormat, message: Message, spec: MessageSpec) -> Message:
    sent = wire.encode(message, spec)
    check_message(CHANNEL, KEY, sent, wire.spec(spec))
    buffers = Message(sent.header.clone(), tuple(section.detach().clone() for section in sent.sections))
    return wire.take(Arrived(buffers), spec)


@pytest.mark.parametrize("num_rows", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WIRE_DTYPES)
def test_rows_arrive_rounded_and_the_rest_intact(name: str, dtype: torch.dtype, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(num_rows, 32, generator=generator) * 10.0 ** torch.randint(-6, 6, (num_rows, 1))
    spec, message = spec_of(dtype), message_of(rows.to(dtype))
    arrived = through(create_wire_format(name), message, spec)
    check_message(CHANNEL, KEY, arrived, spec)
    assert torch.equal(arrived.header, message.header)
    for ours, theirs in zip(arrived.sections[1:], message.sections[1:], strict=True):
        assert torch.equal(ours, theirs)
    exact = message.sections[0].double()
    error = (arrived.sections[0].double() - exact).abs()
    if name == "same" or (name == "bf16" and dtype is torch.bfloat16):
        assert error.sum() == 0
    elif name == "bf16":
        assert torch.equal(arrived.sections[0], message.sections[0].bfloat16().float())
    else:
        # 3 bits of mantissa: half a step is 1/16 of a number's power of two; below 2**-6 of the scale steps are fixed.
        largest = exact.abs().amax(dim=1, keepdim=True) if num_rows else exact
        assert (error <= exact.abs() / 16 * 1.01 + largest / 448 * 2.0**-10).all()
        assert num_rows == 0 or 0 < error.norm() / exact.norm() < 0.04


def test_bytes_of_a_row() -> None:
    """Against fp32: half, and a quarter with 4 bytes of scale a row."""
    spec = spec_of(torch.float32)
    hidden = {name: create_wire_format(name).spec(spec).sections[0].row_bytes for name in WIRE_DTYPES}
    assert hidden == {"same": 128, "bf16": 64, "fp8": 32}
    assert create_wire_format("fp8").spec(spec).sections[3].row_bytes == 4


def test_fp8_of_zeros_tiny_and_huge_rows() -> None:
    rows = torch.stack([torch.zeros(32), torch.full((32,), 1e-30), torch.full((32,), 3e38), torch.full((32,), -1e-45)])
    arrived = through(create_wire_format("fp8"), message_of(rows), spec_of(torch.float32)).sections[0]
    assert torch.equal(arrived[0], torch.zeros(32))
    assert torch.allclose(arrived[1:3], rows[1:3], rtol=1e-6, atol=0)
    assert arrived[3].abs().max() <= 1e-38


@pytest.mark.parametrize("name", WIRE_DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_overflow_stays_visible(name: str, value: float) -> None:
    rows = torch.ones(3, 32)
    rows[1, 5] = value
    arrived = through(create_wire_format(name), message_of(rows), spec_of(torch.float32)).sections[0]
    assert arrived.isfinite().all(dim=1).tolist() == [True, False, True]


def test_history_is_left_behind() -> None:
    rows = torch.ones(3, 32, requires_grad=True) * 2
    for name in ("bf16", "fp8"):
        sent = create_wire_format(name).encode(message_of(rows), spec_of(torch.float32))
        assert not any(section.requires_grad for section in sent.sections)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown wire dtype 'fp3'; choose from same, bf16, fp8"):
        create_wire_format("fp3")


class _Owned(Arrived):
    """A message that whoever takes it may keep."""

    def take(self) -> Message:
        return self.message


@pytest.mark.parametrize("dtype, copied", [(torch.bfloat16, False), (torch.float32, True)])
def test_bf16_copies_only_what_it_converts(dtype: torch.dtype, copied: bool) -> None:
    spec, wire = spec_of(dtype), create_wire_format("bf16")
    handle = _Owned(wire.encode(message_of(torch.ones(7, 32, dtype=dtype)), spec))
    taken = wire.take(handle, spec)
    assert (taken is not handle.message) == copied
    assert torch.equal(taken.sections[0], torch.ones(7, 32, dtype=dtype))
