"""The flags themselves, and what each is where the command line leaves it open."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_disagmoe.schedule_choice import NAMES as SCHEDULES

TRANSPORTS = ("torch", "nixl")
DISPATCH = ("per-expert", "per-rank", "per-node")
WIRE_DTYPES = ("same", "bf16", "fp8")
INITS = ("replay", "local")
RECOMPUTE = ("none", "attention", "ffn", "both")


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: as on the command line.
        type: of its value; a whole number must be at least 1, any other a positive finite one. ``bool``: it takes none.
        default: where neither the command line nor a plan says it; ``None`` means that nothing is set.
        help: for ``--help``.
        choices: the values it takes, all of them.
    """

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str
    choices: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        """Its name in the namespace."""
        return self.name.removeprefix("--").replace("-", "_")

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value that has this flag's type."""
        if self.choices and value not in self.choices:
            return f"{self.name} {value!r}: choose from {', '.join(self.choices)}"
        if self.type is int and value < 1:
            return f"{self.name} must be at least 1, got {value}"
        if self.type is float and not (value > 0 and math.isfinite(value)):
            return f"{self.name} must be positive and finite, got {value}"
        return None


FLAGS = (
    Flag("--af-attention-groups", int, 1, "p_A, attention groups"),
    Flag("--af-ffn-groups", int, None, "p_F, FFN groups (default: p_A)"),
    Flag("--af-attention-ranks", int, 1, "M, data-parallel ranks per attention group"),
    Flag("--af-ffn-ranks", int, 1, "N, expert-parallel ranks per FFN group"),
    Flag(
        "--af-schedule",
        str,
        "interleaved-1f1b",
        f"{' | '.join(SCHEDULES)} | a schedule file, which also says which group holds which layer",
    ),
    Flag(
        "--af-place-layers",
        str,
        "in-turn",
        "which attention group holds which layer: in-turn | balanced (fewer where the output layer is) | the group of "
        "every MoE layer and, last, of the output layer, as in 0,1,0,1,1 or (0,1)*2,1; after a slash FFN groups",
    ),
    Flag(
        "--af-tail-weight",
        float,
        None,
        "forward time of output layer and loss in attention stages (default: a plan's; for balanced by FLOPs; else 0)",
    ),
    Flag("--af-micro-batch-group-size", int, None, "G (default: from the cost model)"),
    Flag("--af-max-live-micro-batches", int, None, "most activations alive on a group (default: any number)"),
    Flag("--af-recompute", str, "none", "stages that keep their input alone and run again in backward", RECOMPUTE),
    Flag("--af-redispatch", bool, False, "FFN ranks keep nothing of a stage; its tokens are sent again for backward"),
    Flag("--af-transport", str, "torch", "what moves tensors between the sides", TRANSPORTS),
    Flag("--af-dispatch", str, "per-rank", "one copy of a token per ... of its experts", DISPATCH),
    Flag("--af-ranks-per-node", int, None, "for per-node and the planner's hand-over (default: LOCAL_WORLD_SIZE)"),
    Flag("--af-wire-dtype", str, "same", "of hidden states under way; same: as computed", WIRE_DTYPES),
    Flag("--af-plan", str, None, "a plan file from disagmoe plan; sets the above where they are not given"),
    Flag("--af-init", str, "replay", "vanilla's initial weights, or local draws", INITS),
    Flag("--af-trace-dir", str, None, "write per-rank traces into this folder"),
    Flag("--af-timeout-seconds", float, 600.0, "how long an edge may stall"),
)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the AF-pipe flags to Megatron's parser; what is not given parses as ``None`` (see ``settle``)."""
    group = parser.add_argument_group(title="AF-pipe", description="attention and experts on disjoint ranks")
    group.add_argument("--af-pipe", action="store_true", help="Put attention and experts on disjoint ranks.")
    for flag in FLAGS:
        if flag.type is bool:
            group.add_argument(flag.name, action="store_const", const=True, default=None, help=flag.help)
            continue
        known = f" [{' | '.join(flag.choices)}]" if flag.choices else ""
        default = f" (default: {flag.default})" if flag.default is not None else ""
        group.add_argument(flag.name, type=flag.type, default=None, help=f"{flag.help}{known}{default}")
    return parser


def given(args: argparse.Namespace) -> list[str]:
    """The AF flags other than ``--af-pipe`` that the command line has, before ``settle``."""
    return [flag.name for flag in FLAGS if getattr(args, flag.dest) is not None]


def settle(args: argparse.Namespace) -> None:
    """Give every AF flag that the command line leaves open its value, in place.

    Raises:
        ValueError: where a plan or a schedule file cannot be read or contradicts a flag.
    """
    if args.af_plan is not None:
        _from_plan(args)
    choice = args.af_schedule
    if choice is not None and choice not in SCHEDULES:
        _from_schedule_file(args)
    for flag in FLAGS:
        if getattr(args, flag.dest) is None:
            setattr(args, flag.dest, flag.default)
    if args.af_ffn_groups is None:
        args.af_ffn_groups = args.af_attention_groups
    if args.af_ranks_per_node is None:
        args.af_ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _from_plan(args: argparse.Namespace) -> None:
    """What the plan sets; the command line goes first."""
    from megatron_disagmoe.planner.plan_file import flags_of, read_plan

    known = {flag.dest: flag for flag in FLAGS}
    for name, value in flags_of(read_plan(args.af_plan)).items():
        flag = known.get(name)
        if flag is None or name == "af_plan":
            raise ValueError(f"--af-plan {args.af_plan}: flags.--{name.replace('_', '-')}: a plan cannot set that")
        if type(value) is not flag.type or flag.fault(value):
            raise ValueError(f"--af-plan {args.af_plan}: flags.{flag.fault(value) or f'{flag.name} {value!r}'}")
        if getattr(args, name) is None:
            setattr(args, name, value)


def _from_schedule_file(args: argparse.Namespace) -> None:
    from megatron_disagmoe.schedule_choice import ScheduleChoice

    placement = ScheduleChoice(args.af_schedule).placement()
    for name, groups in (
        ("af_attention_groups", placement.num_attention_groups),
        ("af_ffn_groups", placement.num_ffn_groups),
    ):
        asked = getattr(args, name)
        if asked not in (None, groups):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--af-schedule {args.af_schedule} has {groups} such groups, but {flag} {asked}: drop it")
        setattr(args, name, groups)
