"""Asynchronous many-to-many transfers between attention ranks and FFN ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_disagmoe.transport.base import (
    ChannelSpec,
    ChannelTraffic,
    Message,
    MessageSpec,
    RecvHandle,
    Section,
    SendHandle,
    TransferKey,
    Transport,
    TransportError,
    TransportTimeout,
)

__all__ = [
    "TRANSPORTS",
    "ChannelSpec",
    "ChannelTraffic",
    "Message",
    "MessageSpec",
    "RecvHandle",
    "Section",
    "SendHandle",
    "TransferKey",
    "Transport",
    "TransportError",
    "TransportTimeout",
    "create_transport",
]

#: Names that `create_transport` knows.
TRANSPORTS = ("torch", "nixl")


def create_transport(
    name: str, channels: Sequence[ChannelSpec], *, device: torch.device, timeout_seconds: float
) -> Transport:
    """Create the transport of this rank; every rank of the world calls it with the same ``channels``.

    Args:
        name: one of ``TRANSPORTS``.
        channels: every channel of the job, also those this rank is not on, in the same order everywhere.
        device: where the sections live (``cpu`` or this rank's CUDA device).
        timeout_seconds: how long one ``wait`` may last.

    Raises:
        ValueError: for an unknown name, a timeout that is not positive, or channel names that repeat,
            or where the package of ``nixl`` is missing.
    """
    if name == "torch":
        from megatron_disagmoe.transport.torch_backend import TorchTransport

        return TorchTransport(channels, device=device, timeout_seconds=timeout_seconds)
    if name == "nixl":
        from megatron_disagmoe.transport.nixl_backend import NixlTransport

        return NixlTransport(channels, device=device, timeout_seconds=timeout_seconds)
    raise ValueError(f"unknown transport {name!r}; choose from {', '.join(TRANSPORTS)}")
