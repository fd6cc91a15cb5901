"""Which of the candidates get schedules, and which of those is best.

Schedules of large problems take seconds each, so none is built that cannot win by its lower bound. Every shape first
gets the one that says most about it: layers in turn, whole backwards, which memory seldom keeps from being good. Shapes
of equal depth come first, as theirs are nearest to the analytic time. Then the others follow (split backwards, fewer
layers beside the output layer), the best shape's first. In the end other choices are tried for the best shapes, and for
those that no schedule fits.

What is likely to lose is left out too: what would still be behind with more than such a change has gained elsewhere,
and what would be with less over its bound than an order of the same depths has taken that could keep more alive.

Small problems are spared nothing but what cannot win.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_disagmoe.planner.allocation import Allocation, ScheduleKind
from megatron_disagmoe.planner.evaluate import allocation_of, evaluate
from megatron_disagmoe.planner.evaluation import Evaluation
from megatron_disagmoe.planner.placing import ways_to_place
from megatron_disagmoe.planner.rerank import Ranked, in_order, live_cap, no_faster_than, rank
from megatron_disagmoe.planner.search import Found, search
from megatron_disagmoe.planner.space import fixed_sizes

#: Shapes whose other choices are tried, of small and of large ones; and how many choices are looked at.
_REFINED, _REFINED_LARGE, _CHOICES = 2, 4, 200
#: Most of them that are scheduled, for each shape: many where a schedule is small (layers x micro-batches), else few.
_MANY, _FEW, _SMALL = 40, 3, 200
#: Where schedules are large, an analytic time this many times the best real one is not scheduled: schedules of choices
#: that are alike lose alike.
_BEHIND = 1.05
#: What a schedule could gain at most by its bound (relative) that is not worth building it; and a shape's further ones
#: where they are large.
_WORTH, _WORTH_MORE = 0.002, 0.01
#: A shape's further schedules took this share of the time of its first one at least, wherever that was looked at; and
#: what luck may gain over what was seen before.
_GAIN, _LUCK = 0.85, 0.95


def rerank(*found: Found, progress: Callable[[int, int], None] | None = None) -> list[Ranked]:
    """What of ``found`` fits with its real schedule, the fastest first; ties by utilisation, then by fewer GPUs.

    ``progress`` is told how many looks of how many are done; how many there are is an upper bound until the last.
    """
    contest = _Contest()
    shapes = [_Shape.of(evaluation) for evaluation in _in_turn(found)]
    done, most = 0, 3 * len(shapes) + _REFINED_LARGE

    def looked() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, most)

    for shape in shapes:
        contest.first_look(shape)
        looked()
    for shape in sorted(shapes, key=lambda shape: shape.seconds):
        contest.look_further(shape)
        looked()
    without = [shape.evaluation for shape in shapes if shape.fits_nowhere]
    for evaluation in without:
        _refine(evaluation, math.inf, contest)
        looked()
    for each in _worth_refining(in_order(contest.ranked)):
        _refine(each.evaluation, each.step_seconds, contest)
        looked()
    if progress:
        progress(most, most)
    return in_order(contest.ranked)


def _worth_refining(ranked: Sequence[Ranked]) -> list[Ranked]:
    """The best few; where they are large, of different sizes and not far behind."""
    if not ranked or _is_small(ranked[0].evaluation):
        return list(ranked[:_REFINED])
    first: dict[tuple[object, ...], Ranked] = {}
    for each in ranked:
        a = each.evaluation.allocation
        if each.step_seconds <= _BEHIND * ranked[0].step_seconds:
            first.setdefault((*a.sizes.values(), a.attention_pool, a.ffn_pool), each)
    return list(first.values())[:_REFINED_LARGE]


def _in_turn(found: Sequence[Found]) -> list[Evaluation]:
    """The best of every search, then the second of every search, and so on; equal depths first."""

    def evaluations() -> Iterator[tuple[tuple[int, bool, float], Evaluation]]:
        for each in found:
            for at in range(len(each.seconds)):
                evaluation = evaluate(each.problem, allocation_of(each.problem, each.candidates, at))
                a = evaluation.allocation
                yield (at, a.attention_groups != a.ffn_groups, evaluation.step_seconds), evaluation

    return [evaluation for _, evaluation in sorted(evaluations(), key=lambda one: one[0])]


#: In what a schedule differs from a shape's first one, its kind and its placement, and whether it dispatches again.
#: None where it is that one.
_Change = tuple[ScheduleKind, int, bool] | None
#: A way to place the layers, a kind of schedule, and what that changes.
_Way = tuple[Evaluation, ScheduleKind, _Change]


def _change(a: Allocation, kind: ScheduleKind, place: int) -> _Change:
    return None if kind != "split-backward" and place == 0 else (kind, place, a.redispatch)


def _is_small(evaluation: Evaluation) -> bool:
    """Whether schedules take no time worth saving."""
    return evaluation.num_micro_batches * evaluation.problem.num_layers <= _SMALL


@dataclass
class _Shape:
    """One candidate with the ways to schedule it.

    ``first``, ``seconds``: step time of the first schedule that there was, and of the best; infinite where none was.
    """

    evaluation: Evaluation
    ways: list[_Way]
    first: float = math.inf
    seconds: float = math.inf
    fits_nowhere: bool = False

    @classmethod
    def of(cls, evaluation: Evaluation) -> _Shape:
        """Whole backwards before split ones, layers in turn before others."""
        a = evaluation.allocation
        kinds: list[ScheduleKind] = [a.schedule]
        if a.schedule != "sequential":
            kinds = [kind for kind in evaluation.problem.space.schedules if kind != "sequential"]
            kinds.sort(key=lambda kind: kind == "split-backward")
        placed = list(enumerate(ways_to_place(evaluation)))
        return cls(evaluation, [(way, kind, _change(a, kind, place)) for kind in kinds for place, way in placed])


#: What became of a schedule that might win; left out is what cannot, or what has been ranked already.
Entry = Ranked | Literal["none fits", "left out"]


@dataclass(frozen=True)
class _Seen:
    """An order that was built: the cap that it had, and its step time over its bound, infinite where none fitted."""

    cap: int
    over_bound: float


class _Contest:
    """Ranks what may still win; the same only once."""

    def __init__(self) -> None:
        self.ranked: list[Ranked] = []
        self.best = math.inf
        self.tried = 0
        self._entered: set[Allocation] = set()
        self._gained: dict[_Change, float] = {}  # the best of a change so far: its time over that of the shape's first
        self._seen: dict[tuple[int, int, ScheduleKind, bool], list[_Seen]] = {}

    def first_look(self, shape: _Shape) -> None:
        """Rank the first schedule of a shape that may win and fits; all of them where they are small.

        And of the best so far the others at once, so that less is built after it (but those that dispatch again take
        long, and seldom gain).
        """
        small, results = _is_small(shape.evaluation), list[Entry]()
        while shape.ways and (small or not any(isinstance(result, Ranked) for result in results)):
            way, kind, _ = shape.ways.pop(0)
            results.append(self.enter(way, kind))
        times = [result.step_seconds for result in results if isinstance(result, Ranked)]
        shape.first = shape.seconds = min(times, default=math.inf)
        shape.fits_nowhere = "none fits" in results and not times
        if times and shape.first <= self.best and not shape.evaluation.allocation.redispatch:
            self.look_further(shape)

    def look_further(self, shape: _Shape) -> None:
        """Rank a shape's other schedules that may win and are not hopeless."""
        for way, kind, change in shape.ways:
            if self.is_hopeless(change, shape.first):
                continue
            result = self.enter(way, kind, worth=_WORTH_MORE)
            if result != "left out":
                seconds = result.step_seconds if isinstance(result, Ranked) else math.inf
                self._gained[change] = min(seconds / shape.first, self._gained.get(change, math.inf))

    def is_hopeless(self, change: _Change, seconds: float) -> bool:
        """Whether a ``change`` of what takes ``seconds`` would still be behind, by what it gained elsewhere."""
        return change is not None and max(_GAIN, _LUCK * self._gained.get(change, 0.0)) * seconds >= self.best

    def enter(self, evaluation: Evaluation, kind: ScheduleKind, *, worth: float = _WORTH) -> Entry:
        """Rank an allocation with this kind of schedule, unless its bound says that it cannot win."""
        allocation = replace(evaluation.allocation, schedule=kind, group_size=1)
        small = _is_small(evaluation)
        if allocation in self._entered or (not small and evaluation.step_seconds > _BEHIND * self.best):
            return "left out"
        evaluation = evaluate(evaluation.problem, allocation)
        enough = self.best * (1 - worth)
        if evaluation.fill_bound + evaluation.synchronise_seconds >= enough:
            return "left out"
        least = no_faster_than(evaluation)
        if least >= enough:
            return "left out" if math.isfinite(least) else "none fits"
        a = allocation
        seen = self._seen.setdefault((a.attention_groups, a.ffn_groups, kind, a.redispatch), [])
        cap = live_cap(evaluation)
        freer = min((each for each in seen if each.cap >= cap), key=lambda each: each.cap, default=None)
        if not small and freer and least * max(1.0, _LUCK * freer.over_bound) >= self.best:
            return "left out"
        self._entered.add(allocation)
        self.tried += 1
        ranked = rank(evaluation, kind, below=enough)
        seen.append(_Seen(cap, ranked.step_seconds / least if ranked else math.inf))
        if ranked is None:
            return "none fits"
        self.ranked.append(ranked)
        self.best = min(self.best, ranked.step_seconds)
        return ranked


def _refine(shape: Evaluation, seconds: float, contest: _Contest) -> None:
    """Rank other choices (layout, dispatch, levers, kinds of schedule) for the sizes of ``shape``.

    ``seconds``: its step time; infinite where no schedule fits.
    """
    problem, small = shape.problem, _is_small(shape)
    sizes = replace(problem, space=fixed_sizes(problem.space, shape.allocation))
    found = search(sizes, keep=_CHOICES, every_choice=True)
    every = [evaluate(sizes, allocation_of(sizes, found.candidates, at)) for at in range(len(found.seconds))]
    most = contest.tried + (_MANY if small else _FEW)
    for choice in sorted(every, key=lambda each: each.fill_bound + each.synchronise_seconds):
        if contest.tried >= most:
            break
        kind = choice.allocation.schedule
        for place, placed in enumerate(ways_to_place(choice)):
            change = _change(choice.allocation, kind, place)
            if small or math.isinf(seconds) or not contest.is_hopeless(change, seconds):
                contest.enter(placed, kind, worth=_WORTH if small or seconds <= contest.best else _WORTH_MORE)
