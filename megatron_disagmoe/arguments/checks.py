"""Everything that can be wrong with the flags, found before a process group exists."""

from __future__ import annotations

import argparse
import importlib.util

from megatron_disagmoe.arguments.flags import FLAGS, given, settle
from megatron_disagmoe.arguments.refusals import refused
from megatron_disagmoe.arguments.sizes import as_text, ffn_node_size, layout, schedule_choice, tail_weight, topology
from megatron_disagmoe.schedule_choice import NAMES as SCHEDULES
from megatron_disagmoe.schedule_choice import step_schedule
from megatron_disagmoe.topology import Topology

#: Megatron's flags without which it says "assertion failed", or we cannot work anything out.
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "num_experts")


def check(args: argparse.Namespace, world_size: int) -> list[str]:
    """What is wrong with the flags for ``world_size`` processes, as messages; empty where training can start.

    Settles the AF flags (``flags.settle``).
    """
    if not args.af_pipe:
        without = given(args)
        return [f"{', '.join(without)} without --af-pipe: add --af-pipe, or drop them"] if without else []
    errors = _values(args)
    if not errors:
        try:
            settle(args)
        except ValueError as error:
            errors.append(str(error))
    errors += refused(args)
    missing = [_flag(name) for name in _NEEDED if getattr(args, name) in (None, 0)]
    if missing:
        errors.append(f"--af-pipe trains a mixture-of-experts GPT, and {', '.join(missing)} is not set: set it")
    return errors or _not_here(args) + _sizes(args, world_size)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _values(args: argparse.Namespace) -> list[str]:
    values = ((flag, getattr(args, flag.dest)) for flag in FLAGS)
    return [fault for flag, value in values if value is not None and (fault := flag.fault(value))]


def _not_here(args: argparse.Namespace) -> list[str]:
    """What the flags ask for and this installation, or this version, does not have."""
    errors = []
    if args.af_transport == "nixl" and importlib.util.find_spec("nixl") is None:
        errors.append("--af-transport nixl needs the package nixl, which is not installed: pip install nixl==1.5.1")
    return errors


def _sizes(args: argparse.Namespace, world_size: int) -> list[str]:
    experts, topk = args.num_experts, args.moe_router_topk
    errors = []
    if experts % args.af_ffn_ranks:
        errors.append(
            f"--num-experts {experts} does not divide over --af-ffn-ranks {args.af_ffn_ranks}: "
            f"choose a divisor of {experts}"
        )
    if topk > experts:
        errors.append(f"--moe-router-topk {topk} is more than --num-experts {experts}: choose at most {experts}")
    try:
        num_layers = len(layout(args).moe_layers)
        if not num_layers:
            return [*errors, "--moe-layer-freq leaves no MoE layer: AF-pipe needs at least one"]
        errors += _placing(args)
        sizes = topology(args, world_size)
        args.af_place_layers = as_text(sizes.placement)  # from here on, and in checkpoints, it is spelled out
        ffn_node_size(args, sizes)
    except ValueError as error:
        return [*errors, str(error)]
    vanilla_ep = args.expert_model_parallel_size
    if experts % vanilla_ep:
        errors.append(
            f"--expert-model-parallel-size {vanilla_ep} names the vanilla run whose initial weights are reproduced; it "
            f"must divide the {experts} experts"
        )
    errors += _batches(args, sizes)
    return errors or _schedule(args, sizes)


def _placing(args: argparse.Namespace) -> list[str]:
    """What is wrong with how layers are to be placed. Works the weight of the tail out once, for all ranks alike.

    Raises:
        ValueError: where the weight cannot be worked out.
    """
    choice, way, weight = schedule_choice(args), args.af_place_layers, args.af_tail_weight
    if choice.is_file:
        known = ("in-turn", as_text(choice.placement()))
        more = [("--af-place-layers", way)] if way not in known else []
        more += [("--af-tail-weight", weight)] if weight is not None else []
        return [f"--af-schedule {choice.name} has placed the layers, {flag} {value}: drop one" for flag, value in more]
    if args.af_plan is not None and weight is not None:
        return [f"--af-plan {args.af_plan} has the tail's time, --af-tail-weight {weight} cannot change it: drop one"]
    if way == "balanced" and args.af_plan is None and weight is None:
        args.af_tail_weight = tail_weight(args)
    return []


def _batch_sizes(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Every global batch size of the run, with the flag that names it; one micro-batch per rank where none is given.

    Of ``--step-batch-size-schedule`` ("THRESHOLD:SIZE ...") words of another form are left to Megatron's own parser.
    ``--rampup-batch-size`` is not among them: Megatron 0.19 takes the flag, warns and ignores it.
    """
    if (steps := args.step_batch_size_schedule) is not None:
        sizes = (word.partition(":")[2] for word in steps.split())
        return [("--step-batch-size-schedule, size", int(size)) for size in sizes if size.isdecimal()]
    return [("--global-batch-size", int(args.global_batch_size))] if args.global_batch_size is not None else []


def _batches(args: argparse.Namespace, sizes: Topology) -> list[str]:
    """Batch sizes that do not come out as whole micro-batches on each of the M*R attention ranks of a group."""
    per_micro_batch = args.micro_batch_size * sizes.data_parallel_size
    return [
        f"{name} {size} is not a multiple of {per_micro_batch} = --micro-batch-size {args.micro_batch_size} x "
        f"{sizes.data_parallel_size} attention ranks of a group, all replicas: make it one"
        for name, size in _batch_sizes(args)
        if size < 1 or size % per_micro_batch
    ]


def _schedule(args: argparse.Namespace, sizes: Topology) -> list[str]:
    """What is wrong with the training schedule, which is built and verified here, before anything starts."""
    choice = schedule_choice(args)
    for flag, value in (
        ("--af-micro-batch-group-size", choice.group_size),
        ("--af-max-live-micro-batches", choice.max_live),
        ("--af-redispatch", choice.redispatch or None),
    ):
        if choice.is_file and value is not None:
            return [f"--af-schedule {choice.name} is a finished schedule, {flag} {value} cannot change it: drop one"]
    if choice.is_file and args.step_batch_size_schedule is not None:
        several = f"--af-schedule {choice.name} is for one number of micro-batches, --step-batch-size-schedule makes "
        return [several + f"several: name a schedule ({', '.join(SCHEDULES)}), or drop --step-batch-size-schedule"]
    per_micro_batch = args.micro_batch_size * sizes.data_parallel_size
    counts = sorted({size // per_micro_batch for _, size in _batch_sizes(args)} or {1})
    try:
        plan = [step_schedule(choice, sizes.placement, count, forward_only=False) for count in counts][-1]
    except ValueError as error:
        return [str(error)]
    if plan.is_split and args.transformer_impl not in ("local", None):
        impl = f"--transformer-impl {args.transformer_impl}"
        splits = f"--af-schedule {choice.name} splits backwards, which layers of {impl} cannot do: "
        return [splits + "add --transformer-impl local, or use interleaved-1f1b"]
    return []
