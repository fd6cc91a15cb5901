"""Records of every private Megatron symbol this package replaces or calls (see ``megatron_seams``)."""

from __future__ import annotations

from megatron_disagmoe.seam_records.checkpoints import CHECKPOINTS
from megatron_disagmoe.seam_records.cpu import CPU_STAND_INS, UPSTREAM_FIXES
from megatron_disagmoe.seam_records.model import CALLED
from megatron_disagmoe.seam_records.record import Seam
from megatron_disagmoe.seam_records.training import AF_PIPE, BENCHMARKS

__all__ = ["CALLED", "SEAMS", "Seam"]

SEAMS: dict[str, Seam] = {
    seam.symbol: seam for seam in (*CPU_STAND_INS, *UPSTREAM_FIXES, *AF_PIPE, *CHECKPOINTS, *CALLED, *BENCHMARKS)
}
