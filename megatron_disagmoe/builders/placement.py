"""Which group holds which layers where stages are not alike: fewer on the group that also has a long tail.

A placement as text lists the attention group of every stage A(0) .. A(L), the tail last, and after a slash the FFN
group of every F(0) .. F(L-1), which may be left out where they go in turn: ``0,1,0,1,1/0,1,0,1``. ``(0,1)*2,1`` is
short for ``0,1,0,1,1``.
"""

from __future__ import annotations

import re

from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.simulator.costs import StageCosts

#: Ways to place layers that have a name.
WAYS = ("in-turn", "balanced")


def placed(
    way: str, *, num_layers: int, num_attention_groups: int, num_ffn_groups: int, costs: StageCosts
) -> Placement:
    """The placement that ``way`` asks for: one of ``WAYS``, or a placement as text.

    Args:
        costs: what ``balanced`` balances.

    Raises:
        ValueError: where the text is none, or is for other sizes; with both.
    """
    if way == "balanced":
        return balanced_placement(num_layers, num_attention_groups, num_ffn_groups, costs)
    plain = Placement.round_robin(
        num_layers=num_layers, num_attention_groups=num_attention_groups, num_ffn_groups=num_ffn_groups
    )
    if way == "in-turn":
        return plain
    attention, slash, ffn = way.partition("/")
    stages = _numbers(attention)
    if len(stages) != num_layers + 1:
        raise ValueError(
            f"{way!r} places {len(stages)} attention stages, but {num_layers} MoE layers have {num_layers + 1}, the "
            f"tail with the loss included: list that many groups"
        )
    experts = _numbers(ffn) if slash else list(plain.ffn)
    if len(experts) != num_layers:
        raise ValueError(
            f"{way!r} places {len(experts)} FFN stages, but there are {num_layers} MoE layers: list as many"
        )
    return Placement(num_attention_groups, num_ffn_groups, tuple(stages), tuple(experts))


def to_text(placement: Placement) -> str:
    """The placement as text; ``placed`` reads it."""
    return "/".join(",".join(map(str, groups)) for groups in (placement.attention, placement.ffn))


def _numbers(text: str) -> list[int]:
    """Group numbers with ``(...)*N`` written out."""
    written_out = re.sub(
        r"\(([\d,]+)\)\*(\d{1,4})", lambda found: ",".join([found[1]] * int(found[2])), text.replace(" ", "")
    )
    if not re.fullmatch(r"\d+(,\d+)*", written_out):
        raise ValueError(
            f"{text!r} is no list of groups: name {' or '.join(WAYS)}, or write the group of every attention stage, "
            f"the tail last, as in 0,1,0,1,1 or (0,1)*2,1 (FFN stages after a slash)"
        )
    return [int(number) for number in written_out.split(",")]


def balanced_placement(
    num_layers: int, num_attention_groups: int, num_ffn_groups: int, costs: StageCosts
) -> Placement:
    """Layers go round the groups in turn; a group that has its share of the work is left out from then on.

    FFN stages are alike, so theirs are round-robin. Of attention layers, the group of the tail takes as many fewer as
    the tail weighs, the group of A(0) as many fewer as the embedding weighs, and every group at least one. Where that
    makes the busiest group no less busy than round-robin does, it is round-robin.

    Raises:
        ValueError: where a group would hold no layer.
    """
    plain = Placement.round_robin(
        num_layers=num_layers, num_attention_groups=num_attention_groups, num_ffn_groups=num_ffn_groups
    )
    best, least = plain, busiest_attention(plain, costs)
    for tail in range(num_attention_groups):
        counts = _counts(num_layers, num_attention_groups, tail, costs)
        attention = (*_in_turn(counts), tail)
        made = Placement(num_attention_groups, num_ffn_groups, attention, plain.ffn)
        work = busiest_attention(made, costs)
        if work < least * (1 - 1e-9):
            best, least = made, work
    return best


def busiest_attention(placement: Placement, costs: StageCosts) -> float:
    """Forward time of one micro-batch on the attention group that has the most."""
    work = [0.0] * placement.num_attention_groups
    for layer, group in enumerate(placement.attention):
        work[group] += costs.forward(2 * layer, num_layers=placement.num_layers)
    return max(work)


def _counts(num_layers: int, num_groups: int, tail: int, costs: StageCosts) -> list[int]:
    """Layers of every group: one each, then each to the group that has the least work so far."""
    work = [costs.attention] * num_groups
    work[0] += costs.embedding
    work[tail] += costs.tail
    counts = [1] * num_groups
    for _ in range(num_layers - num_groups):
        group = min(range(num_groups), key=lambda one: work[one])
        counts[group] += 1
        work[group] += costs.attention
    return counts


def _in_turn(counts: list[int]) -> list[int]:
    """Groups of the layers: round after round, each as long as it has layers left.

    So the group with fewer is left out at the end of the model, next to the tail that makes up for them. Left out at
    the beginning or here and there the steps of the examples in docs/builders.md take 5 to 20% longer.
    """
    return [group for lap in range(max(counts)) for group, count in enumerate(counts) if lap < count]
