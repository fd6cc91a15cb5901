"""Replaces Megatron's ``initialize_model_parallel`` by one that builds every block of the topology."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

import torch
from megatron.training import get_args

from megatron_disagmoe import arguments, parallel_state
from megatron_disagmoe.training import transfers
from megatron_disagmoe.transport import Transport, create_transport

MODEL_BUILDER = "megatron_disagmoe.model.builder.AFGPTModelBuilder"

#: Arguments of ``initialize_model_parallel`` that do not depend on the role.
_SHARED = (
    "distributed_timeout_minutes",
    "nccl_communicator_config_path",
    "create_gloo_process_groups",
    "high_priority_stream_groups",
    "use_sharp",
    "sharp_enabled_group",
)

_TRANSPORT: Transport | None = None


def transport() -> Transport:
    """The transport of this rank, opened with the process groups."""
    assert _TRANSPORT is not None, "the process groups are not initialised"
    return _TRANSPORT


def replacing(original: Callable[..., None]) -> Callable[..., None]:
    """``initialize_model_parallel`` for AF-pipe, on top of Megatron's."""

    def initialize_model_parallel(*sizes: Any, **options: Any) -> None:
        global _TRANSPORT
        args = get_args()
        topology = arguments.topology(args, args.world_size)
        parallel_state.initialize(
            topology,
            initialize_model_parallel=original,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            **{name: options[name] for name in _SHARED if name in options},
        )
        _TRANSPORT = create_transport(
            args.af_transport,
            transfers.channels(args),
            device=torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu"),
            timeout_seconds=args.af_timeout_seconds,
        )
        atexit.register(_TRANSPORT.close)

    return initialize_model_parallel


def _on_gpu() -> bool:
    """Whether tensors live on a CUDA device (``cpu`` stands in for torch.cuda where there is none)."""
    return torch.version.cuda is not None and torch.zeros(0, device=torch.cuda.current_device()).is_cuda
