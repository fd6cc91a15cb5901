"""From the flags of ``disagmoe plan`` to what the search may choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.space import FFN_LEVERS, LAYOUTS, Space

_SIZES = (
    "attention_groups",
    "ffn_groups",
    "attention_ranks",
    "ffn_ranks",
    "replicas",
    "tensor_parallel",
    "context_parallel",
    "expert_tensor_parallel",
)
_FFN_NAMES = {"none": FFN_LEVERS[0], "selective": FFN_LEVERS[1], "full": FFN_LEVERS[2], "redispatch": FFN_LEVERS[3]}
_CHOICES: dict[str, dict[str, Any]] = {
    "recompute_attention": {level.label: level for level in Recompute},
    "recompute_ffn": _FFN_NAMES,
    "dispatch": {mode: mode for mode in Space().dispatch},
    "layout": {layout.value: layout for layout in LAYOUTS},
    "schedule": {kind: kind for kind in Space().schedules},
    "place_layers": {way: way for way in Space().place_layers},
}
_FIELDS = {"recompute_ffn": "ffn_levers", "layout": "layouts", "schedule": "schedules"}


def space_of(*, fixed: Sequence[str], bytes_per_parameter: str | None, **others: Any) -> Space:
    """The space that ``--fix NAME=VALUE[,VALUE]`` and the other flags leave.

    Raises:
        ValueError: for a name or a value that there is not.
    """
    chosen: dict[str, Any] = dict(others)
    if bytes_per_parameter is not None:
        chosen["bytes_per_parameter"] = _whole_numbers("--bytes-per-parameter", bytes_per_parameter)
    for entry in fixed:
        name, sign, values = entry.partition("=")
        if not sign or name not in (*_SIZES, *_CHOICES):
            raise ValueError(f"--fix {entry}: give NAME=VALUE, with NAME one of {', '.join((*_SIZES, *_CHOICES))}")
        if name in _SIZES:
            chosen[name] = _whole_numbers(f"--fix {name}", values)
            continue
        known = _CHOICES[name]
        unknown = [value for value in values.split(",") if value not in known]
        if unknown:
            raise ValueError(f"--fix {name}={unknown[0]}: choose from {', '.join(known)}")
        chosen[_FIELDS.get(name, name)] = tuple(known[value] for value in values.split(","))
    return Space(**chosen)


def _whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} {text}: whole numbers are needed, with commas between") from None
    if min(numbers) < 1 or max(numbers) > 10_000_000:
        raise ValueError(f"{flag} {text}: numbers from 1 to 10,000,000 are needed")
    return numbers


def executable_space(space: Space) -> Space:
    """What of ``space`` this version can run: no tensor or context parallelism, recomputation of whole stages.

    Raises:
        ValueError: nothing is left.
    """
    narrowed: dict[str, Any] = {}
    limits: dict[str, tuple[Any, ...]] = {
        "tensor_parallel": (1,),
        "context_parallel": (1,),
        "expert_tensor_parallel": (1,),
        "recompute_attention": (Recompute.NONE, Recompute.FULL),
        "ffn_levers": tuple(lever for lever in FFN_LEVERS if lever[0] is not Recompute.SELECTIVE),
    }
    for name, possible in limits.items():
        left = tuple(value for value in getattr(space, name) if value in possible)
        if not left:
            raise ValueError(f"--executable: this version runs none of the values fixed for {name}")
        narrowed[name] = left
    return replace(space, **narrowed)
