"""Which schedules are built for large problems, with orders that are made up: no schedule is built here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_disagmoe.planner import contest
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import Allocation
from megatron_disagmoe.planner.contest import rerank
from megatron_disagmoe.planner.evaluate import allocation_of, evaluate
from megatron_disagmoe.planner.evaluation import Evaluation
from megatron_disagmoe.planner.rerank import Ranked, live_cap, no_faster_than
from megatron_disagmoe.planner.search import Found, search
from megatron_disagmoe.planner.space import Space
from tests.planner.problems import problem

#: Built, in order: what, by which kind.
Built = list[Allocation]


@pytest.fixture(scope="module")
def found() -> Found:
    """Large: 32 layers x 64 micro-batches."""
    space = Space(
        attention_ranks=(16,),
        replicas=(1,),
        tensor_parallel=(1,),
        context_parallel=(1,),
        expert_tensor_parallel=(1,),
        dispatch=("per-node",),
        place_layers=("in-turn",),
    )
    return search(problem(space=space), keep=4)


def _made_up(monkeypatch: pytest.MonkeyPatch, over_bound: Callable[[Allocation], float]) -> Built:
    """Every order takes ``over_bound`` times its lower bound."""
    built: Built = []

    def rank(evaluation: Evaluation, kind: str, *, below: float) -> Ranked | None:
        assert no_faster_than(evaluation) < below  # what cannot win is not built
        a = evaluation.allocation
        assert a.schedule == kind
        assert a not in built  # nothing twice
        built.append(a)
        seconds = over_bound(a) * no_faster_than(evaluation)
        nothing = evaluation.attention, evaluation.ffn
        return Ranked(evaluation, None, None, None, {}, seconds - evaluation.synchronise_seconds, *nothing)  # type: ignore[arg-type]

    monkeypatch.setattr(contest, "rank", rank)
    monkeypatch.setattr(contest, "_CHOICES", 20)
    return built


def _shape(a: Allocation) -> Allocation:
    return replace(a, schedule="sequential", place_layers="in-turn")


def test_the_best_of_what_is_built_wins(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    built = _made_up(monkeypatch, lambda a: 1.2 if a.schedule == "interleaved-1f1b" else 1.1)
    ranked = rerank(found)
    assert [a.schedule for a in built[:2]] == ["interleaved-1f1b", "split-backward"]
    assert _shape(built[0]) == _shape(built[1])
    assert ranked[0].evaluation.allocation.schedule == "split-backward"
    assert ranked[0].step_seconds == min(each.step_seconds for each in ranked)


def test_a_change_that_lost_is_not_tried_again(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    built = _made_up(monkeypatch, lambda a: 1.1 if a.schedule == "interleaved-1f1b" else 2.0)
    rerank(found)
    split = [a for a in built if a.schedule == "split-backward" and not a.redispatch and a.place_layers == "in-turn"]
    assert len(split) <= 1
    assert sum(a.schedule == "interleaved-1f1b" for a in built) > 1


def test_how_far_behind_a_change_may_be_tried() -> None:
    """By hand, with a best of 10 s: a change gains 15% at most, or 5% more than it gained before."""
    known: contest._Change = ("split-backward", 0, False)
    lost: contest._Change = ("split-backward", 1, False)
    never: contest._Change = ("interleaved-1f1b", 1, False)
    one = contest._Contest()
    one.best = 10.0
    one._gained = {known: 0.99, lost: 1.2}
    assert one.is_hopeless(known, 10.7)  # 0.95 x 0.99 x 10.7 = 10.06
    assert not one.is_hopeless(known, 10.6)  # 9.97
    assert one.is_hopeless(lost, 9.0)  # 0.95 x 1.2 x 9.0 = 10.26
    assert one.is_hopeless(never, 11.8)  # 0.85 x 11.8 = 10.03
    assert not one.is_hopeless(never, 11.7)  # 9.95
    assert not one.is_hopeless(None, 100.0)


def test_what_lost_with_more_room_is_not_built_with_less(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """An order took five times its bound: with as little room or less it would be behind, with more who knows."""
    _made_up(monkeypatch, lambda a: 5.0)
    base = replace(allocation_of(found.problem, found.candidates, 0), recompute_ffn=Recompute.FULL, redispatch=True)
    ways = [evaluate(found.problem, replace(base, recompute_attention=level)) for level in Recompute]
    little, some, much = sorted(ways, key=live_cap)
    assert live_cap(little) < live_cap(some) < live_cap(much)
    one = contest._Contest()
    assert isinstance(one.enter(some, "interleaved-1f1b"), Ranked)
    one.best = 2 * max(no_faster_than(each) for each in ways)
    assert one.enter(little, "interleaved-1f1b") == "left out"
    assert isinstance(one.enter(little, "split-backward"), Ranked)  # of that nothing is known
    assert isinstance(one.enter(much, "interleaved-1f1b"), Ranked)
