"""Small damages to a schedule, each drawn by hypothesis, and a count of what was tried."""

from __future__ import annotations

import dataclasses
from collections import Counter

from hypothesis import strategies as st

from megatron_disagmoe.schedules.actions import Action, Edge, Kind, Schedule

KINDS = (
    "swap neighbours",
    "swap any two",
    "drop",
    "duplicate",
    "move",
    "move to another group",
    "rename",
    "insert",
    "reverse a stretch",
)

#: For the summary at the end of a test run: (mutation, verdict) -> how many.
TRIED: Counter[tuple[str, str]] = Counter()


@st.composite
def mutated(draw: st.DrawFn, schedule: Schedule) -> tuple[str, Schedule]:
    """One mutation of ``schedule`` and its name; the result may be just as safe."""
    name = draw(st.sampled_from(KINDS))
    lists = {group: list(actions) for group, actions in schedule.actions.items()}
    group = draw(st.sampled_from([group for group, actions in lists.items() if actions]))
    actions = lists[group]
    places = st.integers(0, len(actions) - 1)
    at = draw(places)
    if name == "swap neighbours":
        other = min(at + 1, len(actions) - 1)
        actions[at], actions[other] = actions[other], actions[at]
    elif name == "swap any two":
        other = draw(places)
        actions[at], actions[other] = actions[other], actions[at]
    elif name == "drop":
        del actions[at]
    elif name == "duplicate":
        actions.insert(draw(places), actions[at])
    elif name == "move":
        action = actions.pop(at)
        actions.insert(draw(places), action)
    elif name == "move to another group":
        action = actions.pop(at)
        target = lists[draw(st.sampled_from(list(lists)))]
        target.insert(draw(st.integers(0, len(target))), action)
    elif name == "insert":
        action = draw(renamed(draw(st.sampled_from([action for mine in lists.values() for action in mine]))))
        actions.insert(at, action)
    elif name == "rename":
        actions[at] = draw(renamed(actions[at]))
    else:
        end = draw(places)
        actions[at : end + 1] = reversed(actions[at : end + 1])
    return name, dataclasses.replace(schedule, actions={group: tuple(mine) for group, mine in lists.items()})


@st.composite
def renamed(draw: st.DrawFn, action: Action) -> Action:
    """``action`` with one of its fields changed, mostly within what exists."""
    field = draw(st.sampled_from(Action._fields))
    if field == "kind":
        return action._replace(kind=draw(st.sampled_from(Kind)))
    if field == "layer":
        return action._replace(layer=draw(st.integers(-1, 6)))
    if field == "micro_batch":
        return action._replace(micro_batch=draw(st.integers(-1, 4)))
    if field == "edge":
        return action._replace(edge=draw(st.sampled_from([None, *Edge])))
    return action._replace(gradient=not action.gradient)
