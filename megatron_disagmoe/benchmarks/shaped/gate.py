"""What a rank does between two steps: nothing, until it is told to take the next one."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from typing import Any

from megatron_disagmoe import megatron_seams

SYMBOL = "megatron.training.training:train_step"
GO = b"g"
READY = b"\n"
"""What a rank writes when it has come to its gate and waits there."""


def install(go: int, done: int) -> None:
    """Hold every training step until a byte comes on file descriptor ``go``; report it as a line on ``done``.

    ``READY`` is written there before each wait.

    Where ``go`` is closed the process ends at once, with exit code 0.
    """
    megatron_seams.wrap(SYMBOL, lambda original: _gated(original, go, done))


def _gated(original: Callable[..., Any], go: int, done: int) -> Callable[..., Any]:
    def train_step(*args: Any, **kwargs: Any) -> Any:
        os.write(done, READY)
        if os.read(go, 1) != GO:
            os._exit(0)
        used, start = _cpu_seconds(), time.perf_counter()
        result = original(*args, **kwargs)
        report = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": _cpu_seconds() - used,
            "loss": _number(result[0].get("lm loss")),
            "grad_norm": _number(result[5]),
        }
        os.write(done, (json.dumps(report) + "\n").encode())
        return result

    return train_step


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
