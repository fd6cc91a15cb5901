"""The ``disagmoe`` command.

Each sub-command lives in a module of its own and is imported only when it is called, so that
``disagmoe schedule`` never pays for importing torch. ``COMMANDS`` is the whole table.
"""

from __future__ import annotations

import importlib
from typing import Any

import typer
import typer.main
from typer.core import TyperGroup

COMMANDS: dict[str, tuple[str, str]] = {
    "schedule": ("megatron_disagmoe.cli.schedule", "Build, verify and draw pipeline schedules."),
    "plan": ("megatron_disagmoe.cli.plan", "Find the fastest allocation that fits, as a plan file."),
    "simulate": ("megatron_disagmoe.cli.simulate", "Simulate a step of a training system."),
    "reproduce": ("megatron_disagmoe.cli.reproduce", "The paper's figures by simulation, beside its numbers."),
    "parity": ("megatron_disagmoe.cli.parity", "Train with AF-pipe and with plain Megatron; compare."),
    "checkpoint": ("megatron_disagmoe.cli.checkpoint", "Compare checkpoints."),
    "check": ("megatron_disagmoe.cli.check", "Check a training command's flags; starts nothing."),
    "patch": ("megatron_disagmoe.cli.patch", "Apply our patches to a Megatron-LM checkout."),
    "trace": ("megatron_disagmoe.cli.trace", "Merge per-rank traces and report busy time."),
    "bench": ("megatron_disagmoe.cli.bench", "Benchmarks: JSON and a picture each."),
    "doctor": ("megatron_disagmoe.cli.doctor", "Say what this machine can run."),
}


class _LazyGroup(TyperGroup):
    """Import a sub-command's module only when that sub-command is asked for.

    Typer carries a private copy of click, whose types have no public names: hence ``Any``.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command = typer.main.get_command(importlib.import_module(module).app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Disaggregated mixture-of-experts training for Megatron-LM.",
)


@app.callback()
def _root() -> None:
    """Disaggregated mixture-of-experts training for Megatron-LM."""


def main() -> None:
    """Entry point of the ``disagmoe`` console script."""
    app()
