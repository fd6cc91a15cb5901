"""The part of the optimizer's state that all ranks share: hyperparameters by parameter group, and the step.

Megatron writes it once, from global rank 0, and hands it to every rank. Its form follows from the optimizer:

    one = {"state": {"common_step": ...}, "param_groups": [...]}                fp32
        | {"optimizer": {...as above...}, "fp32_from_fp16_params": [...]}       bf16, fp16
        | {"optimizer": {"param_groups": [{..., "step": ...}, ...]},
           "param_state_sharding_type": ...}                                    distributed
    state = one                          # no expert parallelism: one optimizer for everything
          | {0: one, 1: one}             # one for dense parameters, one for experts

A role of AF-pipe holds parameters of one of the two kinds only, and the other kind's optimizer has seen no step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

State = dict[Any, Any]
Group = dict[str, Any]

PLAIN, MIXED, DISTRIBUTED = "fp32", "mixed precision", "distributed"
_MAIN = "fp32_from_fp16_params"
_EXPERT = "is_expert_parallel"


def parts(state: State) -> list[State]:
    """The optimizers in a state, in order: one, or dense and expert."""
    return [state[index] for index in sorted(state)] if 0 in state else [state]


def kind(state: State) -> str:
    """Which of Megatron's optimizers wrote it."""
    first = parts(state)[0]
    if "param_state_sharding_type" in first:
        return DISTRIBUTED
    return MIXED if "optimizer" in first else PLAIN


def share_step(state: State) -> None:
    """Give every optimizer in ``state`` the step that those with parameters have counted, in place.

    Without it a rank whose parameters are of the kind that rank 0 has none of could not load what rank 0 wrote.
    """
    inner = [_inner(part) for part in parts(state)]
    for found in (one["state"]["common_step"] for one in inner if "common_step" in one.get("state", {})):
        for one in inner:
            one.setdefault("state", {}).setdefault("common_step", found)
        break
    groups = [group for one in inner for group in one.get("param_groups", [])]
    for found in (group["step"] for group in groups if group.get("step") is not None):
        for group in groups:
            if group.get("step") is None:
                group["step"] = found
        break


def refit(state: State, wanted: Sequence[Sequence[Group]], *, identifiers: Sequence[str]) -> State:
    """``state`` in the form of a run whose optimizers have the parameter groups ``wanted``; itself where it has it.

    What is saved of a group does not depend on whether its parameters are experts' or not, nor on which optimizer
    steps it. So each wanted group takes over the saved group that agrees in everything else.

    Args:
        state: as saved.
        wanted: for each optimizer of the run its groups.
        identifiers: entries of a group by which Megatron finds its like (``param_group_identifier_keys``).

    Raises:
        ValueError: where a wanted group has no like.
    """
    saved = parts(state)
    keys = [key for key in identifiers if key != _EXPERT]
    groups = [_inner(part)["param_groups"] for part in saved]
    if [_names(part, [*keys, _EXPERT]) for part in groups] == [_names(part, [*keys, _EXPERT]) for part in wanted]:
        return state
    known = {name: group for part in reversed(groups) for name, group in zip(_names(part, keys), part, strict=True)}
    refitted = []
    for part in wanted:
        lacking = [name for name in _names(part, keys) if name not in known]
        if lacking:
            raise ValueError(
                f"its optimizer has no group of parameters with {_say(keys, lacking[0])}; it has "
                f"{'; '.join(_say(keys, name) for name in known)}"
            )
        own = {"param_groups": [
            {**known[name], _EXPERT: group.get(_EXPERT)} for name, group in zip(_names(part, keys), part, strict=True)
        ]}
        first = saved[0]
        refitted.append(
            {**first, "optimizer": {**first["optimizer"], **own}} if "optimizer" in first else {**first, **own}
        )
    return refitted[0] if len(refitted) == 1 else dict(enumerate(refitted))


def _inner(part: State) -> State:
    return part.get("optimizer", part)


def _names(groups: Sequence[Group], keys: Sequence[str]) -> list[tuple[Any, ...]]:
    return [tuple(group.get(key) for key in keys) for group in groups]


def _say(keys: Sequence[str], name: tuple[Any, ...]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, name, strict=True) if value is not None)


def index_main_parameters(state: State) -> None:
    """Key the lists of main parameters of a mixed-precision state by position, empty ones left out, in place.

    Megatron cannot merge lists of different length, and a role's groups of parameters may be empty.
    """
    for part in parts(state):
        if _MAIN in part:
            part[_MAIN] = {
                group: dict(enumerate(parameters)) for group, parameters in enumerate(part[_MAIN]) if parameters
            }
            if not part[_MAIN]:
                del part[_MAIN]


def list_main_parameters(state: State) -> None:
    """Undo ``index_main_parameters``, in place, one list for each group of parameters."""
    if kind(state) != MIXED:
        return
    for part in parts(state):
        groups = part.get(_MAIN, {})
        part[_MAIN] = [
            [groups[group][position] for position in sorted(groups[group])] if group in groups else []
            for group in range(len(part["optimizer"]["param_groups"]))
        ]
