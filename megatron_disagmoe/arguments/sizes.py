"""What the flags ask for: layers by stage, groups, ranks, and the schedule of a step."""

from __future__ import annotations

import argparse

from megatron_disagmoe.model_layers import LayerLayout, moe_pattern
from megatron_disagmoe.schedule_choice import ScheduleChoice, stage_costs
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
        tail=args.af_tail_weight or 0.0,
    )


def placement(args: argparse.Namespace) -> Placement:
    """Which group holds which stage: what a schedule file says, else what ``--af-place-layers`` asks for.

    Raises:
        ValueError: where the sizes do not fit together.
    """
    num_layers = len(layout(args).moe_layers)
    choice = schedule_choice(args)
    if not choice.is_file:
        from megatron_disagmoe.builders.placement import placed

        way, sizes = args.af_place_layers, (args.af_attention_groups, args.af_ffn_groups)
        try:
            costs = stage_costs(choice, num_layers)
            return placed(
                way, num_layers=num_layers, num_attention_groups=sizes[0], num_ffn_groups=sizes[1], costs=costs
            )
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith("--") else f"--af-place-layers {error}") from None
    found = choice.placement()
    if found.num_layers != num_layers:
        raise ValueError(
            f"--af-schedule {choice.name} is for {found.num_layers} MoE layers, but the model has {num_layers}: "
            f"make one for it (disagmoe schedule build --layers {num_layers})"
        )
    return found


def as_text(stages: Placement) -> str:
    """``--af-place-layers`` of a placement."""
    from megatron_disagmoe.builders.placement import to_text

    p, q = stages.num_attention_groups, stages.num_ffn_groups
    if stages.num_layers >= max(p, q) and stages == Placement.round_robin(
        num_layers=stages.num_layers, num_attention_groups=p, num_ffn_groups=q
    ):
        return "in-turn"
    return to_text(stages)


def tail_weight(args: argparse.Namespace) -> float:
    """Forward FLOPs of the tail over the mean of the attention stages before it.

    Raises:
        ValueError: where the flags do not state the model, above all its vocabulary.
    """
    from megatron_disagmoe.planner.model_import import model_from_values
    from megatron_disagmoe.planner.operations import num_flops, stage_operations

    try:
        model = model_from_values(vars(args), name="this model")
    except ValueError as error:
        raise ValueError(
            f"--af-place-layers balanced weighs the output layer by the model's sizes, and {error}: add it, or say "
            f"what the output layer weighs with --af-tail-weight"
        ) from None
    flops = [
        num_flops(stage_operations(model, stage=stage, sequence=args.seq_length))
        for stage in range(model.num_moe_layers + 1)
    ]
    return flops[-1] * (len(flops) - 1) / sum(flops[:-1])


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
