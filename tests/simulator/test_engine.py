"""The event engine: tables worked by hand, and the oracle on random tasks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe.simulator.engine import Tasks, run
from tests.simulator import oracle

NONE = -1


def tasks(
    rows: list[tuple[float, int, int]], *, edges: list[tuple[int, int]] | None = None, priority: list[int] | None = None
) -> Tasks:
    """``rows`` are (duration, first resource, second resource)."""
    duration, first, second = zip(*rows, strict=True)
    before, after = zip(*edges, strict=True) if edges else ((), ())
    return Tasks(
        duration=np.array(duration, float),
        first=np.array(first, np.int64),
        second=np.array(second, np.int64),
        priority=np.array(priority or [0] * len(rows), np.int64),
        before=np.array(before, np.int64),
        after=np.array(after, np.int64),
        num_resources=1 + max(*first, *second, 0),
    )


def starts(given_tasks: Tasks) -> list[float]:
    times = run(given_tasks)
    assert times.end.tolist() == pytest.approx((times.start + given_tasks.duration).tolist())
    return times.start.tolist()


def test_without_resources_tasks_wait_for_each_other_only() -> None:
    """A diamond: 0 before 1 and 2, both before 3."""
    rows = [(1.0, NONE, NONE), (2.0, NONE, NONE), (5.0, NONE, NONE), (1.0, NONE, NONE)]
    assert starts(tasks(rows, edges=[(0, 1), (0, 2), (1, 3), (2, 3)])) == [0, 1, 1, 6]


def test_a_resource_serves_who_came_first() -> None:
    """Task 2 is ready at 1, task 1 at 2, task 3 from the first moment: it holds the resource until 3."""
    rows = [(2.0, NONE, NONE), (1.0, 0, NONE), (1.0, 0, NONE), (3.0, 0, NONE), (1.0, NONE, NONE)]
    assert starts(tasks(rows, edges=[(0, 1), (4, 2)])) == [0, 4, 3, 0, 0]


def test_priority_goes_before_waiting_longer_and_index_decides_ties() -> None:
    rows = [(1.0, 0, NONE)] * 4
    assert starts(tasks(rows)) == [0, 1, 2, 3]
    assert starts(tasks(rows, priority=[3, 2, 1, 2])) == [3, 1, 0, 2]


def test_nothing_idles_behind_a_transfer_that_cannot_start() -> None:
    """Ports 0 and 1 send, 2 and 3 receive. Task 1 wants port 0 first but its receiver is busy; task 2 goes instead."""
    rows = [(4.0, 1, 2), (1.0, 0, 2), (1.0, 0, 3)]
    assert starts(tasks(rows)) == [0, 4, 0]


def test_ports_are_full_duplex() -> None:
    """Two groups, each sending (0, 1) and receiving (2, 3): both directions at once, one message each way at a time."""
    rows = [(3.0, 0, 3), (3.0, 1, 2), (2.0, 0, 3)]
    assert starts(tasks(rows)) == [0, 0, 3]


def test_a_chain_of_who_blocks_whom() -> None:
    """Task 0 blocks 1 (port 0), 1 blocks 2 (port 3), so 2 may go now and 1 later; 3 shares only port 1 with 2."""
    rows = [(2.0, 0, 2), (2.0, 0, 3), (1.0, 1, 3), (1.0, 1, 2)]
    # at 0: task 0 goes; task 1 cannot (port 0); task 2 can; task 3 cannot (ports 1, 2)
    # at 1: task 3 cannot, port 2 is busy until 2; at 2 task 1 (ports 0, 3) and task 3 (ports 1, 2) go
    assert starts(tasks(rows)) == [0, 2, 0, 2]


def test_tasks_of_no_time() -> None:
    rows = [(0.0, 0, NONE), (0.0, 0, NONE), (1.0, 0, NONE), (0.0, NONE, NONE)]
    assert starts(tasks(rows, edges=[(2, 3)])) == [0, 0, 0, 1]
    assert run(tasks([(0.0, NONE, NONE)])).makespan == 0


def test_decimals_are_exact() -> None:
    """0.1 + 0.2 and 0.3 end at the same moment, so the lower index goes first on the resource both wait for."""
    rows = [(0.1, NONE, NONE), (0.2, NONE, NONE), (0.3, NONE, NONE), (1.0, 0, NONE), (1.0, 0, NONE)]
    assert starts(tasks(rows, edges=[(0, 1), (1, 3), (2, 4)]))[3:] == [0.3, 1.3]


def test_no_tasks_at_all() -> None:
    none = np.zeros(0, np.int64)
    assert run(Tasks(none.astype(float), none, none, none, none, none, 0)).makespan == 0


def test_a_circle_is_an_error() -> None:
    rows = [(1.0, NONE, NONE), (1.0, NONE, NONE), (1.0, NONE, NONE)]
    with pytest.raises(ValueError, match=r"2 of 3 tasks never start, the first is task 1"):
        run(tasks(rows, edges=[(0, 1), (1, 2), (2, 1)]))


@st.composite
def random_tasks(draw: st.DrawFn) -> Tasks:
    count, resources = draw(st.integers(1, 14)), draw(st.integers(1, 4))
    rows, edges = [], []
    for task in range(count):
        held = draw(st.lists(st.integers(0, resources - 1), unique=True, max_size=2))
        first, second = (*held, NONE, NONE)[:2]
        rows.append((draw(st.sampled_from((0.0, 0.1, 0.3, 1.0, 1.0, 2.5))), first, second))
        edges += [(before, task) for before in draw(st.sets(st.integers(0, task - 1), max_size=3))] if task else []
    if draw(st.integers(0, 9)) == 0:
        edges.append((count - 1, 0))
    order = draw(st.permutations(range(count)))
    given_tasks = tasks(rows, edges=[(order[b], order[a]) for b, a in edges])
    priority = np.array([draw(st.integers(0, 2)) for _ in range(count)])
    return Tasks(**{**vars(given_tasks), "priority": priority, "num_resources": resources})


@settings(max_examples=400, deadline=None)
@given(random_tasks())
def test_equal_to_the_oracle(given_tasks: Tasks) -> None:
    columns = (given_tasks.first.tolist(), given_tasks.second.tolist(), given_tasks.priority.tolist())
    plain: dict[oracle.Name, oracle.Task] = {
        (index,): oracle.Task(
            oracle.exact(duration), tuple(r for r in (first, second) if r >= 0), priority, (index,), set()
        )
        for index, (duration, first, second, priority) in enumerate(
            zip(given_tasks.duration.tolist(), *columns, strict=True)
        )
    }
    for before, after in zip(given_tasks.before.tolist(), given_tasks.after.tolist(), strict=True):
        plain[after,].needs.add((before,))
    if not oracle.run(plain):
        with pytest.raises(ValueError, match="never start"):
            run(given_tasks)
        return
    assert starts(given_tasks) == pytest.approx([float(task.start or 0) for task in plain.values()])


@given(random_tasks())
@settings(max_examples=50, deadline=None)
def test_the_same_tasks_give_the_same_times(given_tasks: Tasks) -> None:
    try:
        one = run(given_tasks)
    except ValueError:
        return
    assert np.array_equal(one.start, run(given_tasks).start)
