"""One record of a private Megatron symbol, and what several records say."""

from __future__ import annotations

from dataclasses import dataclass

CPU = "megatron_disagmoe.cpu"
FIXES = "megatron_disagmoe.upstream_fixes"
TRAINING = "megatron_disagmoe.training"
MODEL = "megatron_disagmoe.model"
PARITY = "tests/parity/test_parity.py"


@dataclass(frozen=True)
class Seam:
    """One symbol: ``"package.module:name"`` or ``"package.module:Class.name"``.

    ``takes`` names parameters that our use relies on: their loss counts as the symbol's.
    """

    symbol: str
    reason: str
    used_in: str
    test: str
    until: str
    takes: tuple[str, ...] = ()
