"""Why a plan is as it is: what binds each side, and what each lever that is on is good for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import IN_TURN
from megatron_disagmoe.planner.evaluation import Evaluation
from megatron_disagmoe.planner.planning import Outcome, Progress, Request, best_analytic, plan
from megatron_disagmoe.planner.rerank import Ranked, in_order
from megatron_disagmoe.planner.search import TIE
from megatron_disagmoe.planner.states import StateBytes

#: Candidates that the event engine ranks where a plan is only made for comparison.
_KEEP = 2
#: An analytic time this many times a plan's real one needs no schedules to be called longer.
_CLEARLY = 1.1
#: Times closer than this (relative) are told as alike.
_ALIKE = 0.0005


@dataclass(frozen=True)
class Use:
    """How long the busiest group of a side uses a resource in a step."""

    side: str
    resource: str
    seconds: float
    share: float


def uses(ranked: Ranked) -> list[Use]:
    """Compute and ports of both sides, the most used first."""
    e = ranked.evaluation
    a, n, last = e.allocation, e.num_micro_batches, e.problem.num_layers
    m2n, n2m, lane = (float(each[0]) for each in (e.links.m2n, e.links.n2m, e.links.lane))
    again = m2n * a.redispatch
    times = [f + b for f, b in zip(e.costs.forward_times, e.costs.backward_times, strict=True)]
    groups = e.placement.attention
    compute, sending, receiving = (dict.fromkeys(groups, 0.0) for _ in range(3))
    for stage, group in enumerate(groups):
        # M2N and its gradient; what came before, and its gradient; residuals to and from the stages beside it
        both = (stage < last) * m2n + (stage > 0) * n2m
        beside = (*groups[max(0, stage - 1) : stage], *groups[stage + 1 : stage + 2])
        both += lane * sum(other != group for other in beside)
        compute[group] += times[2 * stage]
        sending[group] += both + (stage < last) * again
        receiving[group] += both
    held_f = max(Counter(e.placement.ffn).values())
    busy = [
        ("attention", "compute", max(compute.values())),
        ("attention", "sending", max(sending.values())),
        ("attention", "receiving", max(receiving.values())),
        ("ffn", "compute", held_f * times[1]),
        ("ffn", "sending", held_f * (m2n + n2m)),
        ("ffn", "receiving", held_f * (m2n + n2m + again)),
    ]
    step = ranked.step_seconds
    found = [Use(side, resource, n * seconds, n * seconds / step) for side, resource, seconds in busy]
    return sorted(found, key=lambda use: -use.seconds)


def binding(ranked: Ranked) -> str:
    """What binds, in a sentence."""
    most = uses(ranked)
    first = {side: next(use for use in most if use.side == side) for side in ("attention", "ffn")}
    parts = [f"{use.side}: {use.resource}, busy {use.share:.0%} of the step" for use in first.values()]
    return "; ".join(parts)


def explained(outcome: Outcome, *, progress: Progress | None = None) -> tuple[Outcome, list[str]]:
    """For each lever that is on in the best plan, what the best plan without it would take.

    A plan without a lever that turns out faster is one that the ranking missed: it becomes the best, and is explained
    in turn.
    """
    request = outcome.request
    while True:
        best, said = outcome.ranked[0], []
        for what, without in _without(best.evaluation, request):
            other = _best_without(best, request, without, _labelled(progress, f"without {what}"))
            if isinstance(other, Ranked) and other.step_seconds < best.step_seconds * (1 - TIE):
                ranked = tuple(in_order([other, *outcome.ranked]))
                outcome = replace(outcome, ranked=ranked, state=other.evaluation.problem.state)
                break
            said.append(f"{what}: {_compared(best.step_seconds, other)}")
        else:
            return outcome, said


def _labelled(progress: Progress | None, label: str) -> Progress | None:
    if progress is None:
        return None
    known = progress
    return lambda what, share, count: known(f"{label}: {what}", share, count)


def _without(e: Evaluation, request: Request) -> Iterator[tuple[str, Request]]:
    a, space = e.allocation, request.space
    if a.tensor_parallel * a.context_parallel > 1:
        less = replace(space, tensor_parallel=(1,), context_parallel=(1,))
        cut = f"TP {a.tensor_parallel} x CP {a.context_parallel} on the attention side"
        yield cut, replace(request, space=less)
    if a.expert_tensor_parallel > 1:
        less = replace(space, expert_tensor_parallel=(1,))
        yield f"ETP {a.expert_tensor_parallel}", replace(request, space=less)
    if a.recompute_attention is not Recompute.NONE:
        less = replace(space, recompute_attention=(Recompute.NONE,))
        yield f"{a.recompute_attention.label} recomputation on the attention side", replace(request, space=less)
    if a.redispatch:
        kept = tuple(lever for lever in space.ffn_levers if not lever[1])
        if kept:
            yield "dispatching again for backward", replace(request, space=replace(space, ffn_levers=kept))
    if a.recompute_ffn is not Recompute.NONE:
        kept = tuple(lever for lever in space.ffn_levers if lever[0] is Recompute.NONE) or ((Recompute.NONE, False),)
        less = replace(space, ffn_levers=kept)
        yield f"{a.recompute_ffn.label} recomputation on the FFN side", replace(request, space=less)
    if a.attention_groups != a.ffn_groups:
        yield (
            f"{a.attention_groups} attention to {a.ffn_groups} FFN groups",
            replace(request, space=replace(space, asymmetric=False)),
        )
    if a.place_layers != IN_TURN:
        counts = Counter(e.placement.attention[:-1])
        held = ", ".join(str(counts[group]) for group in range(a.attention_groups))
        yield (
            f"attention layers placed {held}, the output layer on group {e.placement.attention[-1]}",
            replace(request, space=replace(space, place_layers=(IN_TURN,))),
        )
    copies = a.attention_ranks * a.replicas * a.context_parallel
    if space.distributed_optimizer and copies > 1:
        less = replace(space, distributed_optimizer=False)
        yield "the distributed optimizer", replace(request, space=less)
    exact = request.levels()[0]
    if e.problem.state.total < exact.total:
        more = replace(space, bytes_per_parameter=tuple(_more_exact(request, e.problem.state)))
        yield f"{e.problem.state.total} bytes a parameter ({e.problem.state.why})", replace(request, space=more)


def _more_exact(request: Request, state: StateBytes) -> list[int]:
    return [level.total for level in request.levels() if level.total > state.total]


def _best_without(
    ranked: Ranked, request: Request, without: Request, progress: Progress | None
) -> Ranked | float | None:
    """The best plan of a restricted request, or only its analytic step time where that is clearly longer.

    None where nothing fits. At the bytes per parameter of ``ranked``, where those are not the question.
    """
    space = without.space
    if space.bytes_per_parameter == request.space.bytes_per_parameter:
        space = replace(space, bytes_per_parameter=(ranked.evaluation.problem.state.total,))
    without = replace(without, space=space, keep=_KEEP)
    try:
        level = best_analytic(without)
        if level is None or level.seconds > _CLEARLY * ranked.step_seconds:
            return None if level is None else level.seconds
        others = plan(without, progress=progress).ranked
    except ValueError:  # the restricted choices contradict each other
        return None
    return others[0] if others else None


def _compared(seconds: float, other: Ranked | float | None) -> str:
    if other is None:
        return "without it nothing fits"
    takes = other.step_seconds if isinstance(other, Ranked) else other
    change = takes / seconds - 1
    if not isinstance(other, Ranked):
        return f"without it a step takes about {takes:.4g} s ({change:+.0%})"
    if change < _ALIKE:
        return f"without it a step takes as long, {takes:.4g} s"
    return f"the best plan without it takes {takes:.4g} s ({change:+.1%})"
