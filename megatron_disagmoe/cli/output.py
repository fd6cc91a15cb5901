"""What every ``disagmoe`` command prints and how it ends.

``--json`` puts one JSON object on standard output and nothing else; everything meant for people
goes to standard error then. Exit codes: 0 success, 1 what was checked does not hold, 2 bad input.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console

EXIT_OK, EXIT_DOES_NOT_HOLD, EXIT_BAD_INPUT = 0, 1, 2

#: Progress, warnings and errors: always standard error.
err_console = Console(stderr=True)
#: Results for people when ``--json`` is off.
out_console = Console()

JsonOption = typer.Option(False, "--json", help="One JSON object on standard output, nothing else.")


def emit(result: dict[str, Any], *, as_json: bool, render: Callable[[Console], None]) -> None:
    """Print ``result`` as JSON, or call ``render`` with the console for people."""
    if as_json:
        sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    else:
        render(out_console)


@contextlib.contextmanager
def bad_input_exits_2() -> Iterator[None]:
    """Turn a ``ValueError`` or a missing file into one message on standard error and exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        err_console.print(f"disagmoe: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_BAD_INPUT) from error
