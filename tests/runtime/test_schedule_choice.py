"""From flags to the schedule of a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_disagmoe import builders
from megatron_disagmoe.schedule_choice import NAMES, ScheduleChoice, step_schedule
from megatron_disagmoe.schedules.actions import Kind, Placement, Schedule
from megatron_disagmoe.schedules.dataflow import TRANSFER
from megatron_disagmoe.schedules.lowering import compute_only
from megatron_disagmoe.schedules.text import save
from megatron_disagmoe.schedules.verifier import UnsafeScheduleError
from tests.runtime.redispatch import redispatching

TWO = Placement.round_robin(num_layers=4, num_attention_groups=2, num_ffn_groups=2)


def _saved(path: Path, schedule: Schedule) -> ScheduleChoice:
    save(schedule, path)
    return ScheduleChoice(str(path))


def _sequential(placement: Placement = TWO, *, forward_only: bool = False) -> Schedule:
    costs = builders.NOMINAL_COSTS
    return builders.build("sequential", placement, num_micro_batches=3, costs=costs, forward_only=forward_only)


def test_the_names_are_the_builders() -> None:
    assert set(NAMES) == set(builders.KINDS)


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_a_verified_schedule_with_transfers(name: str, forward_only: bool) -> None:
    plan = step_schedule(ScheduleChoice(name), TWO, 5, forward_only=forward_only)
    assert plan.schedule.forward_only == forward_only
    assert all(any(action.kind in TRANSFER for action in actions) for actions in plan.schedule.actions.values())
    assert plan.is_split == (name == "split-backward" and not forward_only)
    assert plan.again == frozenset()
    assert max(plan.peak_live.values()) >= (1 if forward_only else 2)


def test_the_cap_and_the_group_size_reach_the_builder() -> None:
    free = step_schedule(ScheduleChoice("interleaved-1f1b"), TWO, 16, forward_only=False)
    capped = step_schedule(ScheduleChoice("interleaved-1f1b", max_live=6), TWO, 16, forward_only=False)
    assert max(free.peak_live.values()) > 6 >= max(capped.peak_live.values())
    small = step_schedule(ScheduleChoice("interleaved-1f1b", group_size=2), TWO, 16, forward_only=False)
    assert small.schedule.parameters["group_size"] == 2
    with pytest.raises(ValueError, match="needs 3"):
        step_schedule(ScheduleChoice("interleaved-1f1b", max_live=2), TWO, 16, forward_only=False)


def test_redispatch_is_for_training_alone() -> None:
    choice = ScheduleChoice("interleaved-1f1b", redispatch=True)
    assert choice.redispatches
    again = step_schedule(choice, TWO, 3, forward_only=False).again
    assert again == {(layer, micro_batch) for layer in range(4) for micro_batch in range(3)}
    assert step_schedule(choice, TWO, 3, forward_only=True).again == frozenset()


def test_a_file_says_what_training_does_and_where(tmp_path: Path) -> None:
    placement = Placement(2, 1, (1, 1, 0, 0, 1), (0, 0, 0, 0))
    choice = _saved(tmp_path / "mine.txt", redispatching(_sequential(placement), every=2))
    assert choice.placement() == placement
    assert choice.redispatches
    plan = step_schedule(choice, placement, 3, forward_only=False)
    assert plan.again == {(layer, m) for layer in range(4) for m in range(3) if (layer + m) % 2 == 0}
    assert compute_only(plan.schedule).actions == redispatching(_sequential(placement), every=2).actions
    evaluation = step_schedule(choice, placement, 7, forward_only=True).schedule
    assert evaluation.placement == placement
    assert evaluation.num_micro_batches == 7


def test_a_file_for_another_number_of_micro_batches(tmp_path: Path) -> None:
    choice = _saved(tmp_path / "three.txt", _sequential())
    with pytest.raises(ValueError, match=r"three\.txt is for 3 micro-batches, but a step of this run has 4"):
        step_schedule(choice, TWO, 4, forward_only=False)


def test_a_forward_only_file_does_not_train(tmp_path: Path) -> None:
    choice = _saved(tmp_path / "forward.txt", _sequential(forward_only=True))
    with pytest.raises(ValueError, match="is forward only"):
        step_schedule(choice, TWO, 3, forward_only=False)


def test_an_unsafe_file_is_refused_with_the_fault_drawn(tmp_path: Path) -> None:
    schedule = _sequential()
    actions = {
        group: tuple(action for action in mine if (action.kind, action.layer, action.micro_batch) != (Kind.B, 3, 1))
        for group, mine in schedule.actions.items()
    }
    choice = _saved(tmp_path / "unsafe.txt", dataclasses.replace(schedule, actions=actions))
    with pytest.raises(UnsafeScheduleError, match=r"unsafe\.txt: the schedule is not safe to run:\n\nA1: missing-work"):
        step_schedule(choice, TWO, 3, forward_only=False)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None], ids=["folder", "nothing"])
def test_what_is_no_file(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "there")
    with pytest.raises(ValueError, match=r"is neither one of interleaved-1f1b, .* nor a file"):
        ScheduleChoice(str(tmp_path / "there")).placement()


def test_a_file_that_cannot_be_read_names_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "broken.txt").write_text("disagmoe-schedule 1\nnonsense\n")
    with pytest.raises(ValueError, match=r"broken\.txt:2:"):
        ScheduleChoice(str(tmp_path / "broken.txt")).placement()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"--af-schedule .*bytes\.txt: "):
        ScheduleChoice(str(tmp_path / "bytes.txt")).placement()
