"""Stage costs on a command line: one flag a field, errors that name the flag."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from megatron_disagmoe.schedules.actions import Schedule
from megatron_disagmoe.simulator.costs import StageCosts

FLAGS = {
    "attention": "--t-attention",
    "ffn": "--t-ffn",
    "transfer": "--t-transfer",
    "combine": "--t-combine",
    "lane": "--t-lane",
    "tail": "--t-tail",
    "embedding": "--t-embedding",
    "backward_ratio": "--backward-ratio",
    "weight_fraction": "--weight-fraction",
    "recompute_attention": "--recompute-attention",
    "recompute_ffn": "--recompute-ffn",
}
_HELP = {
    "attention": "Forward of an attention stage, in any unit of time.",
    "ffn": "Forward of an FFN stage.",
    "transfer": "A dispatch between two groups; its gradient takes as long.",
    "combine": "A combine (default: as a dispatch).",
    "lane": "A residual's way between two attention groups, on the same ports (default 0: not modelled).",
    "tail": "Forward of final norm, output layer and loss (default 0).",
    "embedding": "What the first attention stage takes on top (default 0).",
    "backward_ratio": "Backward over forward (default 2).",
    "weight_fraction": "Share of a backward that a split one leaves for later (default 0.5).",
    "recompute_attention": "Share of an attention stage's forward that is run again before its backward (default 0).",
    "recompute_ffn": "Share of an FFN stage's forward that is run again before its backward (default 0).",
}


def _option(name: str) -> object:
    return typer.Option(FLAGS[name], help=_HELP[name], show_default=False)


Attention = Annotated[float | None, _option("attention")]
Ffn = Annotated[float | None, _option("ffn")]
Transfer = Annotated[float | None, _option("transfer")]
Combine = Annotated[float | None, _option("combine")]
Lane = Annotated[float | None, _option("lane")]
Tail = Annotated[float | None, _option("tail")]
Embedding = Annotated[float | None, _option("embedding")]
BackwardRatio = Annotated[float | None, _option("backward_ratio")]
WeightFraction = Annotated[float | None, _option("weight_fraction")]
RecomputeAttention = Annotated[float | None, _option("recompute_attention")]
RecomputeFfn = Annotated[float | None, _option("recompute_ffn")]


def costs_of(given: dict[str, float | None], *, otherwise: StageCosts | None = None) -> StageCosts:
    """The costs that ``given`` flags (by field, None where they are absent) state, on top of ``otherwise``.

    Raises:
        ValueError: naming the flag that is missing or makes no sense.
    """
    values = {} if otherwise is None else dataclasses.asdict(otherwise)
    values.update((name, value) for name, value in given.items() if value is not None)
    for name in ("attention", "ffn", "transfer"):
        if name not in values:
            raise ValueError(f"{FLAGS[name]} is missing: {_HELP[name][0].lower()}{_HELP[name][1:]}")
    try:
        return StageCosts(**values)
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        raise ValueError(f"{FLAGS.get(name, name)} {problem}") from error


def recorded_costs(schedule: Schedule) -> StageCosts | None:
    """The costs that a schedule's builder was given, None where its file does not say.

    Raises:
        ValueError: where the file's ``parameter costs`` is something else.
    """
    recorded = schedule.parameters.get("costs")
    if recorded is None:
        return None
    try:
        return StageCosts(**recorded)  # type: ignore[arg-type]  # the next line says so where it is not a mapping
    except (TypeError, ValueError) as error:
        raise ValueError(f"the schedule's parameter costs does not hold the costs of stages: {error}") from error
