"""Reading what people wrote: YAML validated by pydantic, every complaint naming file and field."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megatron_disagmoe.files import shipped_folder


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not yes/no")
    return value


_NoBool = BeforeValidator(_refuse_bool)
#: A count of things; the upper limit only catches slips of the pen.
Count = Annotated[int, _NoBool, Field(ge=1, le=10_000_000)]
CountOrZero = Annotated[int, _NoBool, Field(ge=0, le=10_000_000)]
#: A positive, finite quantity.
Quantity = Annotated[float, _NoBool, Field(gt=0, le=1e15, allow_inf_nan=False)]
QuantityOrZero = Annotated[float, _NoBool, Field(ge=0, le=1e15, allow_inf_nan=False)]
#: Achieved over possible.
Fraction = Annotated[float, _NoBool, Field(gt=0, le=1, allow_inf_nan=False)]


class Strict(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def explain(error: ValidationError, *, source: str) -> str:
    """One line per fault: ``file: field: what is wrong (got ...)``."""
    return "\n".join(_lines(error, source))


def _lines(error: ValidationError, source: str) -> Iterator[str]:
    faults = error.errors(include_url=False)
    places = {fault["loc"] for fault in faults}
    # A list whose only item is wrong is also called too short.
    outer = {place[:length] for place in places for length in range(len(place))}
    for fault in faults:
        if fault["loc"] in outer:
            continue
        field = ".".join(str(part) for part in fault["loc"]) or "the file"
        message = fault["msg"].removeprefix("Value error, ")
        got = fault.get("input")
        shown = f" (got {got!r})" if isinstance(got, str | int | float | bool) else ""
        yield f"{source}: {field}: {message}{shown}"


def validate[StrictModel: Strict](kind: type[StrictModel], content: Any, *, source: str) -> StrictModel:
    """``content`` as a ``kind``.

    Raises:
        ValueError: naming ``source`` and every field that is wrong.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(explain(error, source=source)) from None


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        ValueError: not text.
        OSError: not readable.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error.reason} at byte {error.start}") from None


def parse_yaml(text: str, *, source: str) -> Any:
    """``text`` as YAML (JSON is YAML too).

    Raises:
        ValueError: not YAML, with line and column.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{source}: not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        ValueError: not YAML, or no mapping.
        OSError: not readable.
    """
    content = parse_yaml(read_text(path), source=str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected fields and values, found {type(content).__name__}")
    return content


def dump_yaml(record: BaseModel) -> str:
    """``record`` as YAML, fields in their order of declaration."""
    return yaml.safe_dump(record.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def find_config(kind: Literal["models", "clusters", "gpus", "efficiency"], name_or_path: str) -> Path:
    """The file itself, or the shipped description of that name.

    Raises:
        ValueError: neither exists; lists what is shipped.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    folder = shipped_folder("configs") / kind
    shipped = folder / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(each.stem for each in folder.glob("*.yaml")))
    option = {"models": "--model", "clusters": "--cluster", "gpus": "gpu", "efficiency": "efficiency"}[kind]
    raise ValueError(f"{option}: no file '{name_or_path}', and none shipped of that name; shipped: {names}")


def increasing(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """Check that a curve's sizes increase and its efficiencies are fractions.

    Raises:
        ValueError: otherwise.
    """
    if not points:
        raise ValueError("a curve needs at least one point [size, efficiency]")
    for size, efficiency in points:
        if not (math.isfinite(size) and size > 0 and 0 < efficiency <= 1):
            raise ValueError(f"point [{size}, {efficiency}]: the size must be positive, the efficiency within (0, 1]")
    sizes = [size for size, _ in points]
    if sizes != sorted(set(sizes)):
        raise ValueError(f"the sizes of a curve must increase, got {sizes}")
    return points
