"""Every optimizer step in full precision, which Megatron's log line does not print.

Switched on by the environment variable ``DISAGMOE_STEP_VALUES``, a file that the last rank (the one that holds the
loss) appends one JSON object a step to.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = "DISAGMOE_STEP_VALUES"
_TRAINING_LOG = "megatron.training.training:training_log"


@dataclass(frozen=True)
class StepValues:
    """One optimizer step; ``loss`` and ``grad_norm`` are None where it was skipped."""

    iteration: int
    loss: float | None
    grad_norm: float | None


def read(path: Path) -> list[StepValues]:
    """The steps in a file; none where it is missing."""
    return [StepValues(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def record_if_asked() -> None:
    """Hook into Megatron's log on the last rank, where the environment asks for it."""
    path = os.environ.get(ENVIRONMENT)
    if path is None or int(os.environ.get("RANK", "0")) != int(os.environ.get("WORLD_SIZE", "1")) - 1:
        return
    from megatron_disagmoe import megatron_seams

    if not megatron_seams.is_patched(_TRAINING_LOG):
        megatron_seams.wrap(_TRAINING_LOG, lambda original: _recording(original, Path(path)))


def _recording(original: Callable[..., Any], path: Path) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def training_log(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        step = {
            "iteration": values["iteration"],
            "loss": _number(values["loss_dict"].get("lm loss")),
            "grad_norm": _number(values["grad_norm"]),
        }
        with path.open("a") as file:
            file.write(json.dumps(step) + "\n")
        return original(*args, **kwargs)

    return training_log


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
