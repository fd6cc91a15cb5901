"""The process groups of the ``torch`` transport's channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_disagmoe.transport.base import ChannelSpec

FOREVER = timedelta(days=365)
#: Tags of the header records and of the first of a message's bodies.
RECORD_TAG, FIRST_BODY_TAG = 0, 1


@dataclass
class Groups:
    """The process groups of one channel: header records over ``host``, bodies over ``body``."""

    host: dist.ProcessGroup
    body: dist.ProcessGroup


def create_groups(
    channels: Sequence[ChannelSpec], *, device: torch.device, timeout_seconds: float
) -> dict[str, Groups]:
    """Create every channel's groups, in the same order on every rank; keep those this rank is on."""
    groups = {}
    me = dist.get_rank()
    for channel in channels:
        host = dist.new_group(channel.ranks, backend="gloo", timeout=FOREVER)
        body = host
        if device.type == "cuda":
            # device_id makes torch connect now and use one communicator for every pair, not one per pair later.
            timeout = timedelta(seconds=timeout_seconds)
            body = dist.new_group(channel.ranks, backend="nccl", timeout=timeout, device_id=device)
        if me in channel.ranks:
            groups[channel.name] = Groups(host, body)
    return groups


def reason(error: RuntimeError) -> str:
    """What gloo says, without its source line and its advice."""
    return str(error).split("] ", 1)[-1].split(". This is typically", 1)[0]
