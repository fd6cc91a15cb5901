"""Read back what Megatron's training loop prints: one record a step, one a validation.

Pure text in, dataclasses out, so that tests and drivers need no Megatron. The lines are those of
``megatron.training.training.training_log`` and ``evaluate_and_print_results`` (0.19).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_ITERATION = re.compile(r"\biteration\s+(\d+)/\s*(\d+) \|(.*)")
_FIELD = re.compile(r"\s*([^|:]+(?:\(ms\))?): +([-+0-9.eEnaif]+)\s*(?:\||$)")
_VALIDATION = re.compile(r"\bvalidation loss at iteration (\d+)(?: on (\w+) set)? \| lm loss value: ([-+0-9.eEnaif]+)")


@dataclass(frozen=True)
class Step:
    """One optimizer step. ``fields`` has every number of the line under Megatron's own name for it."""

    iteration: int
    iterations: int
    fields: dict[str, float]

    @property
    def loss(self) -> float | None:
        """Language-model loss in nats a token, ``None`` where the step was skipped."""
        return self.fields.get("lm loss")

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm before clipping."""
        return self.fields.get("grad norm")

    @property
    def seconds(self) -> float:
        """Wall time of the step; the mean over the log interval where that is larger than 1."""
        return self.fields["elapsed time per iteration (ms)"] / 1e3


@dataclass(frozen=True)
class Validation:
    """One evaluation. ``split`` is ``validation`` or ``test`` at the end of training, ``None`` during it."""

    iteration: int
    split: str | None
    loss: float


@dataclass
class TrainingLog:
    """Everything read from one run, in order."""

    steps: list[Step] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)

    def add(self, line: str) -> Step | Validation | None:
        """Read one line; keeps and returns its record, ``None`` for any other line."""
        record = parse(line)
        if isinstance(record, Step):
            self.steps.append(record)
        elif record is not None:
            self.validations.append(record)
        return record

    @property
    def validation(self) -> Validation:
        """The last evaluation on the validation set; the one on the test set, which comes last, does not count."""
        return next(record for record in reversed(self.validations) if record.split != "test")

    @classmethod
    def read(cls, lines: Iterable[str]) -> TrainingLog:
        """All records of ``lines``, for instance an open log file."""
        log = cls()
        for line in lines:
            log.add(line)
        return log


def parse(line: str) -> Step | Validation | None:
    """The record that ``line`` holds, if any."""
    if match := _ITERATION.search(line):
        fields = {name.strip(): float(value) for name, value in _FIELD.findall(match[3])}
        return Step(int(match[1]), int(match[2]), fields)
    if match := _VALIDATION.search(line):
        return Validation(int(match[1]), match[2], float(match[3]))
    return None
