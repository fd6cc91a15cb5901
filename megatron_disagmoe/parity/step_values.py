"""Every optimizer step in full precision, on every rank; Megatron's log line rounds, and only one rank prints it.

Switched on by the environment variable ``DISAGMOE_STEP_VALUES``, a folder into which each rank writes a file of its
own with one JSON object a step.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ENVIRONMENT = "DISAGMOE_STEP_VALUES"
_TRAINING_LOG = "megatron.training.training:training_log"


@dataclass(frozen=True)
class StepValues:
    """One optimizer step as one rank sees it.

    Attributes:
        iteration: from 1.
        loss: None on a rank without the loss.
        grad_norm: None where the step was skipped.
        learning_rate: after the step.
        loss_scale: 1 without mixed precision.
        skipped: whether the step was.
        zeros: zero gradients (``--log-num-zeros-in-grad``).
        params_norm: with ``--log-params-norm``.
        samples: consumed so far.
        micro_batches: of the step.
    """

    iteration: int
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    zeros: float | None = None
    params_norm: float | None = None
    samples: int = 0
    micro_batches: int = 0


AGREED = tuple(f.name for f in fields(StepValues) if f.name != "loss")
"""What all ranks must have alike, whatever their role."""


def read(folder: Path) -> list[list[StepValues]]:
    """The steps of each rank, in order of rank; none where the folder is missing."""
    files = sorted(folder.glob("rank*.jsonl"), key=lambda path: int(path.stem.removeprefix("rank")))
    return [[StepValues(**json.loads(line)) for line in path.read_text().splitlines()] for path in files]


def record_if_asked() -> None:
    """Hook into Megatron's log, where the environment asks for it."""
    folder = os.environ.get(ENVIRONMENT)
    if folder is None:
        return
    from megatron_disagmoe import megatron_seams

    if not megatron_seams.is_patched(_TRAINING_LOG):
        path = Path(folder) / f"rank{os.environ.get('RANK', '0')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        megatron_seams.wrap(_TRAINING_LOG, lambda original: _recording(original, path))


def _recording(original: Callable[..., Any], path: Path) -> Callable[..., Any]:
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    signature = inspect.signature(original)

    def training_log(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        step = {
            "iteration": values["iteration"],
            "loss": _number(values["loss_dict"].get("lm loss")),
            "grad_norm": _number(values["grad_norm"]),
            "learning_rate": values["learning_rate"],
            "loss_scale": values["loss_scale"],
            "skipped": bool(values["skipped_iter"]),
            "zeros": _number(values["num_zeros_in_grad"]),
            "params_norm": _number(values["params_norm"]),
            "samples": get_args().consumed_train_samples,
            "micro_batches": get_num_microbatches(),
        }
        with path.open("a") as file:
            file.write(json.dumps(step) + "\n")
        return original(*args, **kwargs)

    return training_log


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
