"""Megatron's parsing and checking of a command line, with AF-pipe's flags in it."""

from __future__ import annotations

import argparse
import linecache
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_disagmoe import arguments


class BadFlags(ValueError):
    """A command line that training cannot start with; ``messages`` has one entry for each thing to mend."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("\n          ".join(messages))
        self.messages = messages


def with_af_arguments(
    original: Callable[..., argparse.ArgumentParser], fail: Callable[[str], NoReturn]
) -> Callable[..., argparse.ArgumentParser]:
    """``add_megatron_arguments`` that adds the AF flags; ``fail`` is told of a command line that does not parse.

    argparse by itself would print the usage of all of Megatron's 800 flags, once per rank.
    """

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = arguments.add_arguments(original(parser))
        parser.error = fail  # type: ignore[method-assign,assignment]
        return parser

    return add_megatron_arguments


def validate(
    original: Callable[..., argparse.Namespace], args: argparse.Namespace, defaults: dict[str, Any] | None = None
) -> argparse.Namespace:
    """``validate_args`` that knows of AF-pipe.

    Raises:
        BadFlags: with everything that we find wrong; with ``--af-pipe`` also with what Megatron does. Without, its own
            errors are left as they are.
    """
    errors = arguments.check(args, args.world_size)
    if errors:
        raise BadFlags(errors)
    if not args.af_pipe:
        return original(args, defaults or {})
    # Megatron derives data-parallel size and micro-batch counts from the world: it is told of one attention
    # group's ranks, which is the world of the vanilla run that this one equals.
    world_size = args.world_size
    args.world_size = arguments.topology(args, world_size).data_parallel_size
    try:
        args = original(args, defaults or {})
        _check_model(args)
    except (AssertionError, ValueError) as error:
        raise BadFlags([complaint(error)]) from error
    args.world_size = world_size
    return args


def _check_model(args: argparse.Namespace) -> None:
    """Have Megatron check the model's sizes now rather than when every rank builds it."""
    from megatron.training.arguments import core_transformer_config_from_args

    core_transformer_config_from_args(args)


def complaint(error: Exception) -> str:
    """What Megatron objects to: its text, or where it has none, the condition that does not hold."""
    if text := str(error).strip():
        return f"Megatron refuses these flags: {text}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"Megatron refuses these flags: {line} ({frame.filename}:{frame.lineno})"
