"""Every system by the name that the command line knows."""

from __future__ import annotations

from megatron_disagmoe.reproduction.constants import Constants
from megatron_disagmoe.reproduction.systems.batch_overlap import BatchOverlap
from megatron_disagmoe.reproduction.systems.dualpipe import DualPipe, DualPipePerNode
from megatron_disagmoe.reproduction.systems.serial import Comet, Megatron, Serial, Tutel

BASELINES: dict[str, type[Serial]] = {
    system.name: system for system in (Megatron, BatchOverlap, Tutel, Comet, DualPipe, DualPipePerNode)
}
AF_PIPE = "af-pipe"
SYSTEMS = (*BASELINES, AF_PIPE)


def baseline(name: str, constants: Constants) -> Serial:
    """A baseline by name.

    Raises:
        ValueError: there is none.
    """
    if name not in BASELINES:
        raise ValueError(f"there is no baseline {name!r}; choose among {', '.join(BASELINES)}")
    return BASELINES[name](constants)
