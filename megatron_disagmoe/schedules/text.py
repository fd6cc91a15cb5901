"""The text form of a schedule: one file holds placement, parameters and one line of actions per group.

::

    disagmoe-schedule 1
    attention-groups 1
    ffn-groups 1
    micro-batches 2
    forward-only no
    attention 0 0
    ffn 0
    parameter kind "sequential"
    A0: F0.0 >M2N/0.0 <N2M/0.0 F1.0 ...
    F0: <M2N/0.0 F0.0 >N2M/0.0 ...

``F3.12`` is compute action F of layer 3, micro-batch 12; ``>M2N/3.12`` sends and ``<M2N/3.12`` receives, with a ``d``
before the edge for its gradient. ``attention`` lists the group of A(0) .. A(L), ``ffn`` that of F(0) .. F(L-1). A line
``ports in-order`` says that ports serve messages in the order of the lists. Blank lines and lines that begin with ``#``
are skipped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.schedules.dataflow import TRANSFER

FORMAT = "disagmoe-schedule 1"

_FIELDS = ("attention-groups", "ffn-groups", "micro-batches", "forward-only", "attention", "ffn")
_IN_ORDER = "in-order"

_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_HEAD = re.compile(
    rf"(?P<compute>[FBIWD])(?P<layer>{_NUMBER})|(?P<way>[<>])(?P<d>d?)(?P<edge>[A-Z0-9]+)/(?P<at>{_NUMBER})"
)
_GROUP = re.compile(rf"(?P<side>[AF])(?P<index>{_NUMBER}):")
_WHOLE_NUMBER = re.compile(_NUMBER)
_WORD = re.compile(r"\S+")


class ScheduleSyntaxError(ValueError):
    """A schedule file that cannot be read; ``line`` and ``column`` count from 1."""

    def __init__(self, problem: str, *, source: str, line: int, column: int) -> None:
        super().__init__(f"{source}:{line}:{column}: {problem}")
        self.line, self.column = line, column


def action_text(action: Action) -> str:
    """One action as it stands in a file: ``F3.12``, ``>M2N/3.12``, ``<dLANE/3.12``."""
    return f"{_head(action.kind, action.layer, action.edge, action.gradient)}{action.micro_batch}"


def dumps(schedule: Schedule) -> str:
    """The text of ``schedule``; ``loads`` gives back an equal one.

    Raises:
        ValueError: where a parameter's name has blanks, its value is not plain JSON (tuples become lists there), or an
            action is neither a compute action nor a transfer.
    """
    placement = schedule.placement
    lines = [
        FORMAT,
        f"attention-groups {placement.num_attention_groups}",
        f"ffn-groups {placement.num_ffn_groups}",
        f"micro-batches {schedule.num_micro_batches}",
        f"forward-only {'yes' if schedule.forward_only else 'no'}",
        f"attention {' '.join(map(str, placement.attention))}",
        f"ffn {' '.join(map(str, placement.ffn))}",
        *([f"ports {_IN_ORDER}"] if schedule.ports_in_order else []),
        *(_parameter_line(name, value) for name, value in schedule.parameters.items()),
    ]
    heads: dict[tuple[Kind, int, Edge | None, bool], str] = {}
    for group, actions in schedule.actions.items():
        words = [f"{group}:"]
        for kind, layer, micro_batch, edge, gradient in actions:
            head = heads.get((kind, layer, edge, gradient))
            if head is None:
                head = heads[kind, layer, edge, gradient] = _head(kind, layer, edge, gradient)
            words.append(head + str(micro_batch))
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


def save(schedule: Schedule, path: str | Path) -> None:
    """Write ``schedule`` to ``path``."""
    Path(path).write_text(dumps(schedule), encoding="utf-8")


def load(path: str | Path) -> Schedule:
    """Read a schedule file; ``ScheduleSyntaxError`` names its line and column."""
    return loads(Path(path).read_text(encoding="utf-8"), source=str(path))


def loads(text: str, *, source: str = "schedule") -> Schedule:
    """Parse the text form.

    Raises:
        ScheduleSyntaxError: with ``source``, line and column of what cannot be read.
    """
    return _Reader(source).read(text)


def _head(kind: Kind, layer: int, edge: Edge | None, gradient: bool) -> str:
    """An action's text up to and with the dot; the micro-batch follows."""
    if (edge is None) == (kind in TRANSFER) or (edge is None and gradient):
        raise ValueError(
            f"an action of kind {kind.value} with edge {edge} and gradient {gradient} cannot be written: transfers "
            "name an edge, computes name neither"
        )
    if edge is None:
        return f"{kind.value}{layer}."
    return f"{'>' if kind is Kind.SEND else '<'}{'d' if gradient else ''}{edge.value}/{layer}."


def _parameter_line(name: str, value: object) -> str:
    if not _WORD.fullmatch(name):
        raise ValueError(f"parameter name {name!r} cannot be written: it must be one word without blanks")
    try:
        text = json.dumps(value, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"parameter {name} cannot be written: {error}") from error
    if json.loads(text) != value:
        raise ValueError(
            f"parameter {name} is {value!r}, which JSON would give back changed; use plain lists and strings"
        )
    return f"parameter {name} {text}"


@dataclass(frozen=True)
class _Field:
    """One line ``name rest`` and where ``rest`` begins."""

    rest: str
    line: int
    column: int


class _Reader:
    def __init__(self, source: str) -> None:
        self.source = source
        self.fields: dict[str, _Field] = {}
        self.parameters: dict[str, object] = {}
        self.actions: dict[Group, tuple[Action, ...]] = {}
        self._heads: dict[str, tuple[Kind, int, Edge | None, bool]] = {}
        self._numbers: dict[str, int] = {}

    def error(self, problem: str, line: int, column: int = 1) -> ScheduleSyntaxError:
        return ScheduleSyntaxError(problem, source=self.source, line=line, column=column)

    def read(self, text: str) -> Schedule:
        lines = text.split("\n")
        started = False
        for number, line in enumerate(lines, start=1):
            first = _WORD.search(line)
            if first is None or first[0].startswith("#"):
                continue
            if not started:
                if line.split() != FORMAT.split():
                    raise self.error(f"a schedule file begins with '{FORMAT}', not {line[:40]!r}", number)
                started = True
            elif first[0].endswith(":"):
                self._group_line(line, number, first)
            else:
                self._field_line(line, number, first)
        if not started:
            raise self.error(f"the file is empty; it must begin with '{FORMAT}'", 1)
        return self._schedule(len(lines))

    def _field_line(self, line: str, number: int, first: re.Match[str]) -> None:
        name, rest = first[0], line[first.end() :]
        column = first.end() + len(rest) - len(rest.lstrip()) + 1
        if name == "parameter":
            self._parameter(rest.strip(), number, column)
            return
        if name not in (*_FIELDS, "ports"):
            raise self.error(
                f"{name!r} is neither a field of a schedule nor a group such as 'A0:'", number, first.start() + 1
            )
        if name in self.fields:
            raise self.error(f"{name} was already given in line {self.fields[name].line}", number, first.start() + 1)
        self.fields[name] = _Field(rest.strip(), number, column)

    def _parameter(self, rest: str, number: int, column: int) -> None:
        name, _, value = rest.partition(" ")
        if not name or name in self.parameters:
            raise self.error(
                f"parameter {name} was already given" if name else "a parameter needs a name", number, column
            )
        try:
            self.parameters[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise self.error(
                f"the value of parameter {name} is not JSON: {error.msg}", number, column + len(name) + 1 + error.pos
            ) from error

    def _group_line(self, line: str, number: int, first: re.Match[str]) -> None:
        match = _GROUP.fullmatch(first[0])
        if match is None:
            raise self.error(f"{first[0]!r} is not a group: write A0: or F0:", number, first.start() + 1)
        group = Group(Side(match["side"]), int(match["index"]))
        if group in self.actions:
            raise self.error(f"group {group} already has a line", number, first.start() + 1)
        heads, numbers = self._heads, self._numbers
        actions: list[Action] = []
        for word in line.split()[1:]:
            head, _, tail = word.rpartition(".")
            known, micro_batch = heads.get(head), numbers.get(tail)
            if known is None or micro_batch is None:
                try:
                    known, micro_batch = self._learn(head, tail)
                except ValueError as error:
                    at = list(_WORD.finditer(line))[len(actions) + 1].start() + 1
                    raise self.error(f"{word!r} is not an action: {error}", number, at) from error
            kind, layer, edge, gradient = known
            actions.append(Action(kind, layer, micro_batch, edge, gradient))
        self.actions[group] = tuple(actions)

    def _learn(self, head: str, tail: str) -> tuple[tuple[Kind, int, Edge | None, bool], int]:
        """Parse both halves of a word and remember them; ``ValueError`` says what is wrong."""
        if not _WHOLE_NUMBER.fullmatch(tail):
            raise ValueError("it must end in a dot and a micro-batch, as in F3.12")
        match = _HEAD.fullmatch(head)
        if match is None:
            raise ValueError("write F3.12 (kinds F B I W D), >M2N/3.12, <M2N/3.12 or, for a gradient, >dM2N/3.12")
        if match["compute"]:
            known: tuple[Kind, int, Edge | None, bool] = (Kind(match["compute"]), int(match["layer"]), None, False)
        else:
            if match["edge"] not in Edge.__members__:
                raise ValueError(f"there is no edge {match['edge']}; choose among {', '.join(Edge.__members__)}")
            kind = Kind.SEND if match["way"] == ">" else Kind.RECV
            known = (kind, int(match["at"]), Edge[match["edge"]], bool(match["d"]))
        self._heads[head] = known
        self._numbers[tail] = int(tail)
        return known, self._numbers[tail]

    def _schedule(self, last_line: int) -> Schedule:
        for name in _FIELDS:
            if name not in self.fields:
                raise self.error(f"there is no line '{name} ...'", last_line)
        forward_only = self.fields["forward-only"]
        if forward_only.rest not in ("yes", "no"):
            raise self.error(
                f"forward-only is yes or no, not {forward_only.rest!r}", forward_only.line, forward_only.column
            )
        ports = self.fields.get("ports")
        if ports is not None and ports.rest != _IN_ORDER:
            raise self.error(f"ports are {_IN_ORDER}, not {ports.rest!r}", ports.line, ports.column)
        sizes = {name: self._whole(name) for name in ("attention-groups", "ffn-groups", "micro-batches")}
        attention, ffn = self._wholes("attention"), self._wholes("ffn")
        try:
            placement = Placement(sizes["attention-groups"], sizes["ffn-groups"], attention, ffn)
        except ValueError as error:
            raise self.error(str(error), self.fields["attention"].line, self.fields["attention"].column) from error
        return Schedule(
            placement,
            sizes["micro-batches"],
            forward_only.rest == "yes",
            self.actions,
            self.parameters,
            ports_in_order=ports is not None,
        )

    def _whole(self, name: str) -> int:
        values, field = self._wholes(name), self.fields[name]
        if len(values) != 1 or values[0] < 1:
            raise self.error(f"{name} is one positive number, not {field.rest!r}", field.line, field.column)
        return values[0]

    def _wholes(self, name: str) -> tuple[int, ...]:
        field = self.fields[name]
        for word in _WORD.finditer(field.rest):
            if not _WHOLE_NUMBER.fullmatch(word[0]):
                raise self.error(f"{word[0]!r} is not a whole number", field.line, field.column + word.start())
        return tuple(map(int, field.rest.split()))
