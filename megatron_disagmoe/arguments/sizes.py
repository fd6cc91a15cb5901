"""What the flags ask for: layers by stage, groups, ranks, and the schedule of a step."""

from __future__ import annotations

import argparse

from megatron_disagmoe.model_layers import LayerLayout, moe_pattern
from megatron_disagmoe.schedule_choice import ScheduleChoice
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.topology import Topology, count_replicas


def layout(args: argparse.Namespace) -> LayerLayout:
    """Which transformer layers belong to which stage."""
    return LayerLayout.from_pattern(moe_pattern(args.moe_layer_freq, args.num_layers))


def schedule_choice(args: argparse.Namespace) -> ScheduleChoice:
    """Which schedule the flags ask for."""
    return ScheduleChoice(
        args.af_schedule,
        group_size=args.af_micro_batch_group_size,
        max_live=args.af_max_live_micro_batches,
        redispatch=args.af_redispatch,
        recompute_attention=args.af_recompute in ("attention", "both"),
        recompute_ffn=args.af_recompute in ("ffn", "both"),
        plan=args.af_plan,
    )


def placement(args: argparse.Namespace) -> Placement:
    """Which group holds which stage: what a schedule file says, else round-robin.

    Raises:
        ValueError: where the sizes do not fit together.
    """
    num_layers = len(layout(args).moe_layers)
    choice = schedule_choice(args)
    if not choice.is_file:
        return Placement.round_robin(
            num_layers=num_layers,
            num_attention_groups=args.af_attention_groups,
            num_ffn_groups=args.af_ffn_groups,
        )
    found = choice.placement()
    if found.num_layers != num_layers:
        raise ValueError(
            f"--af-schedule {choice.name} is for {found.num_layers} MoE layers, but the model has {num_layers}: "
            f"make one for it (disagmoe schedule build --layers {num_layers})"
        )
    return found


def topology(args: argparse.Namespace, world_size: int) -> Topology:
    """The topology that the flags ask for.

    Raises:
        ValueError: where the sizes do not fit together.
    """
    stages = placement(args)
    replicas = count_replicas(
        world_size,
        num_attention_groups=stages.num_attention_groups,
        num_ffn_groups=stages.num_ffn_groups,
        attention_ranks=args.af_attention_ranks,
        ffn_ranks=args.af_ffn_ranks,
    )
    return Topology(
        placement=stages,
        attention_ranks=args.af_attention_ranks,
        ffn_ranks=args.af_ffn_ranks,
        replicas=replicas,
        redispatch=schedule_choice(args).redispatches,
    )


def ffn_node_size(args: argparse.Namespace, topology: Topology) -> int:
    """FFN ranks that exchange rows among themselves: those of a node with ``per-node`` dispatch, else 1.

    Raises:
        ValueError: where FFN groups lie unevenly on nodes.
    """
    return topology.ffn_ranks_on_a_node(args.af_ranks_per_node) if args.af_dispatch == "per-node" else 1
