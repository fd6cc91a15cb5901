"""The text form: it parses back, and errors name line and column."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.schedules.text import ScheduleSyntaxError, action_text, dumps, load, loads, save
from tests.schedules.strategies import any_schedules

A0, F0 = Group(Side.A, 0), Group(Side.F, 0)

SMALL = """\
disagmoe-schedule 1
attention-groups 1
ffn-groups 1
micro-batches 1
forward-only no
attention 0 0
ffn 0
parameter kind "by hand"
A0: F0.0 >M2N/0.0 <N2M/0.0 F1.0 B1.0 >dN2M/0.0 <dM2N/0.0 I0.0 W0.0
F0: <M2N/0.0 F0.0 >N2M/0.0 <dN2M/0.0 B0.0 >dM2N/0.0
"""


def small() -> Schedule:
    return Schedule(
        placement=Placement(1, 1, (0, 0), (0,)),
        num_micro_batches=1,
        forward_only=False,
        actions={
            A0: (
                Action(Kind.F, 0, 0),
                Action(Kind.SEND, 0, 0, Edge.M2N),
                Action(Kind.RECV, 0, 0, Edge.N2M),
                Action(Kind.F, 1, 0),
                Action(Kind.B, 1, 0),
                Action(Kind.SEND, 0, 0, Edge.N2M, True),
                Action(Kind.RECV, 0, 0, Edge.M2N, True),
                Action(Kind.I, 0, 0),
                Action(Kind.W, 0, 0),
            ),
            F0: (
                Action(Kind.RECV, 0, 0, Edge.M2N),
                Action(Kind.F, 0, 0),
                Action(Kind.SEND, 0, 0, Edge.N2M),
                Action(Kind.RECV, 0, 0, Edge.N2M, True),
                Action(Kind.B, 0, 0),
                Action(Kind.SEND, 0, 0, Edge.M2N, True),
            ),
        },
        parameters={"kind": "by hand"},
    )


def test_text_by_hand() -> None:
    assert dumps(small()) == SMALL
    assert loads(SMALL) == small()


@given(any_schedules())
@settings(deadline=None)
def test_round_trip(schedule: Schedule) -> None:
    assert loads(dumps(schedule)) == schedule


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "schedule.txt"
    save(small(), path)
    assert load(path) == small()


def test_comments_blank_lines_and_crlf_are_skipped() -> None:
    text = "# made by hand\n\n" + SMALL.replace("ffn 0\n", "ffn 0\n\n  # of two lines\n")
    assert loads(text) == small()
    assert loads(text.replace("\n", "\r\n")) == small()


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "words"),
    [
        ("disagmoe-schedule 1", "disagmoe-schedule 2", 1, 1, "begins with 'disagmoe-schedule 1'"),
        ("attention-groups 1", "attention-groups one", 2, 18, "'one' is not a whole number"),
        ("ffn-groups 1", "ffn-groups 0", 3, 12, "positive number, not '0'"),
        ("micro-batches 1", "micro-batches 1 2", 4, 15, "one positive number"),
        ("forward-only no", "forward-only maybe", 5, 14, "yes or no, not 'maybe'"),
        ("forward-only no", "forward_only no", 5, 1, "neither a field"),
        ("attention 0 0", "attention 0 1", 6, 11, "attention group 1 does not exist"),
        ("attention 0 0", "attention 0", 6, 11, "the tail"),
        ("ffn 0", "ffn 0\nffn 0", 8, 1, "already given in line 7"),
        ("ffn 0", "ffn -1", 7, 5, "'-1' is not a whole number"),
        ('"by hand"', "by hand", 8, 16, "not JSON"),
        ("A0: F0.0", "A0: F0,0", 9, 5, "must end in a dot and a micro-batch"),
        ("F1.0", "X1.0", 9, 28, "kinds F B I W D"),
        (">N2M/0.0", ">M2M/0.0", 10, 19, "no edge M2M"),
        ("F0.0 >M2N", "F00.0 >M2N", 9, 5, "kinds F B I W D"),
        ("F0:", "F0.0:", 10, 1, "is not a group"),
        ("F0:", "A0:", 10, 1, "already has a line"),
        ("ffn 0", "ffn 0\nports any", 8, 7, "ports are in-order, not 'any'"),
        ("F0: ", "F0: F1234567890.0 ", 10, 5, "is not an action"),
    ],
)
def test_errors_name_line_and_column(old: str, new: str, line: int, column: int, words: str) -> None:
    assert old in SMALL
    with pytest.raises(ScheduleSyntaxError) as caught:
        loads(SMALL.replace(old, new, 1), source="plan.txt")
    assert (caught.value.line, caught.value.column) == (line, column)
    assert str(caught.value).startswith(f"plan.txt:{line}:{column}: ")
    assert words in str(caught.value)


def test_missing_field_and_empty_file() -> None:
    with pytest.raises(ScheduleSyntaxError, match="no line 'ffn ...'"):
        loads(SMALL.replace("ffn 0\n", ""))
    with pytest.raises(ScheduleSyntaxError, match="the file is empty"):
        loads("# nothing\n")


@pytest.mark.parametrize("parameters", [{"two words": 1}, {"pair": (1, 2)}, {"kind": Kind.F}, {"t": float("inf")}])
def test_parameters_that_would_not_come_back_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="parameter|JSON"):
        dumps(dataclasses.replace(small(), parameters=parameters))


def test_action_text() -> None:
    assert action_text(Action(Kind.SEND, 3, 12, Edge.LANE, True)) == ">dLANE/3.12"
    assert action_text(Action(Kind.D, 3, 12)) == "D3.12"


@pytest.mark.parametrize(
    "action", [Action(Kind.F, 0, 0, Edge.M2N), Action(Kind.SEND, 0, 0), Action(Kind.F, 0, 0, None, True)]
)
def test_actions_without_a_text_are_refused(action: Action) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        action_text(action)
