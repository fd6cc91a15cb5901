"""What a training command's flags would be told at start, found in this process and without starting anything."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn
from unittest import mock

from megatron_disagmoe import arguments, megatron_seams
from megatron_disagmoe.preparation import make_ready
from megatron_disagmoe.schedules.actions import Side

_ADD_ARGUMENTS = "megatron.training.arguments:add_megatron_arguments"


@dataclass(frozen=True)
class RankPlan:
    """What one rank would be; ``layers`` are Megatron's numbers, from 1."""

    rank: int
    group: str
    replica: int
    index: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """``errors`` as training would print them; where there are none and ``--af-pipe`` was given, the ranks."""

    errors: tuple[str, ...]
    ranks: tuple[RankPlan, ...] = ()


def check_flags(flags: Sequence[str], world_size: int) -> Verdict:
    """Parse and check ``flags`` with Megatron's own code, as rank 0 of ``world_size`` processes.

    Prints what Megatron prints. Prepares this process for Megatron as the launcher does, so it is for a process of its
    own.
    """
    try:
        added = make_ready(flags)
    except ValueError as error:
        return Verdict((str(error),))
    from megatron_disagmoe.training import command_line

    try:
        with _as_rank_0([*flags, *added], world_size):
            args = _parse()
            validate = megatron_seams.resolve("megatron.training.arguments:validate_args")
            # As pretrain_gpt.py has it.
            args = command_line.validate(validate, args, {"tokenizer_type": "GPT2BPETokenizer"})
            return Verdict((), _ranks(args, world_size) if args.af_pipe else ())
    except command_line.BadFlags as error:
        return Verdict(tuple(error.messages))
    except (AssertionError, ValueError) as error:
        return Verdict((command_line.complaint(error),))


def _parse() -> argparse.Namespace:
    from megatron.training.arguments import parse_args

    from megatron_disagmoe.training import command_line

    def fail(message: str) -> NoReturn:
        raise command_line.BadFlags([message])

    original = megatron_seams.resolve(_ADD_ARGUMENTS)
    with megatron_seams.patched(_ADD_ARGUMENTS, command_line.with_af_arguments(original, fail)):
        return parse_args()


@contextmanager
def _as_rank_0(flags: Sequence[str], world_size: int) -> Iterator[None]:
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    with mock.patch.dict(os.environ, environment), mock.patch.object(sys, "argv", ["pretrain_gpt.py", *flags]):
        yield


def _ranks(args: argparse.Namespace, world_size: int) -> tuple[RankPlan, ...]:
    topology, layout = arguments.topology(args, world_size), arguments.layout(args)
    roles = [topology.role(rank) for rank in range(world_size)]
    layers_of = {Side.A: layout.attention_layers, Side.F: layout.ffn_layers}
    return tuple(
        RankPlan(
            rank=rank,
            group=str(role.group),
            replica=role.replica,
            index=role.index,
            layers=layers_of[role.group.side](topology.placement, role.group.index),
        )
        for rank, role in enumerate(roles)
    )
