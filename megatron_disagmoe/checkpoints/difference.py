"""How two checkpoints differ, and whether one holds what a run asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_disagmoe.checkpoints.reading import Checkpoint, batches, is_weight

_ELEMENTS_AT_ONCE = 16 * 2**20


@dataclass(frozen=True)
class Difference:
    """Two checkpoints compared.

    Attributes:
        missing: keys of the first that the second lacks.
        unexpected: keys of the second that the first lacks.
        shapes: keys of different shape, with both.
        dtypes: keys of different element type, with both.
        values: keys whose values differ, with the largest absolute difference (infinite where only one is finite).
        num_compared: tensors whose values were compared.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dtypes: dict[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    num_compared: int = 0

    @property
    def max_abs_difference(self) -> float:
        """Over all tensors that both have in one shape; 0 where none differs."""
        return max(self.values.values(), default=0.0)

    @property
    def equal(self) -> bool:
        """The same keys, shapes, types and values."""
        return not (self.missing or self.unexpected or self.shapes or self.dtypes or self.values)

    def as_json(self) -> dict[str, Any]:
        """What ``disagmoe checkpoint diff --json`` prints; an infinite difference is None."""
        return {
            "equal": self.equal,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "shapes": {key: [list(shape) for shape in both] for key, both in self.shapes.items()},
            "dtypes": {key: [str(dtype) for dtype in both] for key, both in self.dtypes.items()},
            "different": {key: _finite(value) for key, value in self.values.items()},
            "max_abs_difference": _finite(self.max_abs_difference),
            "num_compared": self.num_compared,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare(first: Checkpoint, second: Checkpoint, *, optimizer: bool = False) -> Difference:
    """Compare the weights of two checkpoints, and the tensors of the optimizer where ``optimizer``.

    How either was sharded does not matter. Memory: about 100 MB, or twice the largest chunk that was saved.
    """
    mine, theirs = _keys(first, optimizer=optimizer), _keys(second, optimizer=optimizer)
    both = sorted(set(mine) & set(theirs))
    shapes = {key: (first.shape(key), second.shape(key)) for key in both if first.shape(key) != second.shape(key)}
    comparable = [key for key in both if key not in shapes]
    values: dict[str, float] = {}
    for batch in batches((chunk for key in comparable for chunk in first.chunks(key)), num_elements=_ELEMENTS_AT_ONCE):
        for chunk, a, b in zip(batch, first.read(batch), second.read(batch), strict=True):
            difference = largest_difference(a, b)
            if difference > 0:
                values[chunk.key] = max(values.get(chunk.key, 0.0), difference)
    return Difference(
        missing=sorted(set(mine) - set(theirs)),
        unexpected=sorted(set(theirs) - set(mine)),
        shapes=shapes,
        dtypes={key: (first.dtype(key), second.dtype(key)) for key in both if first.dtype(key) != second.dtype(key)},
        values=values,
        num_compared=len(comparable),
    )


def _keys(checkpoint: Checkpoint, *, optimizer: bool) -> list[str]:
    return sorted(key for key in checkpoint.tensors if optimizer or is_weight(key))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference of two tensors of one shape; NaN equals NaN, and infinity itself."""
    if a.numel() == 0:
        return 0.0
    whole = not (a.is_floating_point() or b.is_floating_point())  # exact beyond 2**53, where doubles are not
    x, y = (a.long(), b.long()) if whole else (a.double(), b.double())
    same = (x == y) | (x.isnan() & y.isnan())
    difference = torch.where(same, 0.0, (x - y).abs().double())
    return float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max())


def misfits(requested: Mapping[str, tuple[int | None, ...]], checkpoint: Checkpoint) -> list[str]:
    """What keeps a run from loading a checkpoint, as messages; empty where nothing does.

    Args:
        requested: every tensor that any rank wants to load, with its global shape (None where any size will do).
        checkpoint: which must hold them, and no weight that nobody wants.
    """
    missing = sorted(key for key in requested if key not in checkpoint.tensors)
    lost = [key for key in missing if is_weight(key)]
    unexpected = sorted(key for key in checkpoint.tensors if is_weight(key) and key not in requested)
    shapes = [
        f"{key} is {_shape(checkpoint.shape(key))} there and {_shape(shape)} here"
        for key, shape in sorted(requested.items())
        if key in checkpoint.tensors and not _fits(checkpoint.shape(key), shape)
    ]
    messages = []
    if lost:
        messages.append(f"weights of the model that it lacks: {_listing(lost)}")
    if unexpected:
        messages.append(f"weights in it that the model has no place for: {_listing(unexpected)}")
    if shapes:
        messages.append(f"another shape: {_listing(shapes)}")
    if messages:
        messages.append("give the flags of the model that was saved")
    elif missing:
        messages.append(f"state of the optimizer that it lacks: {_listing(missing)}; add --no-load-optim")
    return messages


def _fits(saved: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(saved) == len(wanted) and all(w in (None, s) for s, w in zip(saved, wanted, strict=True))


def _shape(sizes: tuple[int | None, ...]) -> str:
    return "x".join("any" if size is None else str(size) for size in sizes)


def _listing(names: list[str], *, shown: int = 8) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
