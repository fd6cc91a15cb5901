"""The AF-pipe group of flags and its checks. Reads a parsed namespace; imports neither torch nor Megatron.

Every check returns a message with the numbers and the remedy, so that the launcher and ``disagmoe check`` say the
same thing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_disagmoe.model_layers import LayerLayout, moe_pattern
from megatron_disagmoe.schedule_choice import NAMES as SCHEDULES
from megatron_disagmoe.schedule_choice import ScheduleChoice, step_schedule
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.topology import Topology, count_replicas

TRANSPORTS = ("torch",)
DISPATCH = ("per-expert",)
INITS = ("replay", "local")

_DEFAULTS: dict[str, Any] = {
    "af_attention_groups": 1,
    "af_ffn_groups": None,
    "af_attention_ranks": 1,
    "af_ffn_ranks": 1,
    "af_schedule": "interleaved-1f1b",
    "af_micro_batch_group_size": None,
    "af_max_live_micro_batches": None,
    "af_transport": "torch",
    "af_dispatch": "per-expert",
    "af_init": "replay",
    "af_trace_dir": None,
    "af_timeout_seconds": 600.0,
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the AF-pipe flags to Megatron's parser."""
    group = parser.add_argument_group(title="AF-pipe", description="attention and experts on disjoint ranks")
    group.add_argument("--af-pipe", action="store_true", help="Put attention and experts on disjoint ranks.")
    group.add_argument("--af-attention-groups", type=int, default=1, help="p_A, attention groups.")
    group.add_argument("--af-ffn-groups", type=int, default=None, help="p_F, FFN groups (default: p_A).")
    group.add_argument("--af-attention-ranks", type=int, default=1, help="M, data-parallel ranks per attention group.")
    group.add_argument("--af-ffn-ranks", type=int, default=1, help="N, expert-parallel ranks per FFN group.")
    group.add_argument(
        "--af-schedule",
        type=str,
        default="interleaved-1f1b",
        help=f"{' | '.join(SCHEDULES)} | a schedule file, which also says which group holds which layer.",
    )
    group.add_argument("--af-micro-batch-group-size", type=int, default=None, help="G (default: min(4p, n)).")
    group.add_argument(
        "--af-max-live-micro-batches", type=int, default=None, help="Most activations alive on a group (default: any)."
    )
    group.add_argument("--af-transport", type=str, default="torch", help=" | ".join(TRANSPORTS))
    group.add_argument("--af-dispatch", type=str, default="per-expert", help=" | ".join(DISPATCH))
    group.add_argument("--af-init", type=str, default="replay", help="Vanilla's initial weights, or local draws.")
    group.add_argument("--af-trace-dir", type=str, default=None, help="Write per-rank traces into this folder.")
    group.add_argument("--af-timeout-seconds", type=float, default=600.0, help="How long an edge may stall.")
    return parser


def layout(args: argparse.Namespace) -> LayerLayout:
    """Which transformer layers belong to which stage."""
    return LayerLayout.from_pattern(moe_pattern(args.moe_layer_freq, args.num_layers))


def schedule_choice(args: argparse.Namespace) -> ScheduleChoice:
    """Which schedule the flags ask for."""
    return ScheduleChoice(args.af_schedule, args.af_micro_batch_group_size, args.af_max_live_micro_batches)


def placement(args: argparse.Namespace) -> Placement:
    """Which group holds which stage: what a schedule file says, else round-robin.

    Raises:
        ValueError: where the sizes do not fit together.
    """
    num_layers = len(layout(args).moe_layers)
    choice = schedule_choice(args)
    if not choice.is_file:
        ffn_groups = args.af_ffn_groups if args.af_ffn_groups is not None else args.af_attention_groups
        return Placement.round_robin(
            num_layers=num_layers, num_attention_groups=args.af_attention_groups, num_ffn_groups=ffn_groups
        )
    found = choice.placement()
    for name, given, unset, from_file in (
        ("--af-attention-groups", args.af_attention_groups, 1, found.num_attention_groups),
        ("--af-ffn-groups", args.af_ffn_groups, None, found.num_ffn_groups),
        ("MoE layers in the model:", num_layers, None, found.num_layers),
    ):
        if given not in (unset, from_file):
            raise ValueError(f"--af-schedule {choice.name} has {from_file}, but {name} {given}: make them equal")
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
    )


def check(args: argparse.Namespace, world_size: int) -> list[str]:
    """Everything that is wrong with the AF-pipe flags, as messages; empty where training can start."""
    if not args.af_pipe:
        given = [_flag(name) for name, default in _DEFAULTS.items() if getattr(args, name) != default]
        return [f"{', '.join(given)} without --af-pipe: add --af-pipe, or drop them"] if given else []
    errors = [message for applies, message in _refusals(args) if applies]
    errors += _choices(args)
    errors += _sizes(args, world_size)
    return errors


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _choices(args: argparse.Namespace) -> list[str]:
    later = "; other values come in a later version"
    return [
        f"{_flag(name)} {getattr(args, name)!r}: choose from {', '.join(choices)}{later if name != 'af_init' else ''}"
        for name, choices in (
            ("af_transport", TRANSPORTS),
            ("af_dispatch", DISPATCH),
            ("af_init", INITS),
        )
        if getattr(args, name) not in choices
    ]


def _sizes(args: argparse.Namespace, world_size: int) -> list[str]:
    errors = []
    for name in (
        "af_attention_groups",
        "af_ffn_groups",
        "af_attention_ranks",
        "af_ffn_ranks",
        "af_micro_batch_group_size",
        "af_max_live_micro_batches",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            errors.append(f"{_flag(name)} must be at least 1, got {value}")
    if not args.af_timeout_seconds > 0:
        errors.append(f"--af-timeout-seconds must be positive, got {args.af_timeout_seconds}")
    if not args.num_experts:
        errors.append("--af-pipe needs a mixture of experts: set --num-experts")
    if errors:
        return errors
    if args.num_experts % args.af_ffn_ranks:
        errors.append(
            f"--num-experts {args.num_experts} does not divide over --af-ffn-ranks {args.af_ffn_ranks}: "
            f"choose a divisor of {args.num_experts}"
        )
    return errors + _layers_and_world(args, world_size)


def _layers_and_world(args: argparse.Namespace, world_size: int) -> list[str]:
    try:
        num_layers = len(layout(args).moe_layers)
        if not num_layers:
            return ["--moe-layer-freq leaves no MoE layer: AF-pipe needs at least one"]
        sizes = topology(args, world_size)
    except ValueError as error:
        return [str(error)]
    errors = []
    vanilla_ep = args.expert_model_parallel_size
    if sizes.data_parallel_size % vanilla_ep or args.num_experts % vanilla_ep:
        errors.append(
            f"--expert-model-parallel-size {vanilla_ep} names the vanilla run whose initial weights are reproduced; it "
            f"must divide its data-parallel size M*R = {sizes.data_parallel_size} and the {args.num_experts} experts"
        )
    return errors or _schedule(args, sizes)


def _schedule(args: argparse.Namespace, sizes: Topology) -> list[str]:
    """What is wrong with the training schedule, which is built and verified here, before anything starts."""
    choice = schedule_choice(args)
    if choice.is_file and args.rampup_batch_size is not None:
        several = f"--af-schedule {choice.name} is for one number of micro-batches, --rampup-batch-size has several: "
        return [several + f"name a schedule ({', '.join(SCHEDULES)}), or drop the ramp-up"]
    per_micro_batch = args.micro_batch_size * sizes.data_parallel_size
    global_batch = args.global_batch_size if args.global_batch_size is not None else per_micro_batch
    if global_batch % per_micro_batch:
        return []  # Megatron says so itself
    try:
        step_schedule(choice, sizes.placement, global_batch // per_micro_batch, forward_only=False)
    except ValueError as error:
        return [str(error)]
    return []


def _is_set(name: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: bool(getattr(args, name, False))


def _more_than_one(name: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: (getattr(args, name, 1) or 1) > 1


_UNSUPPORTED: tuple[tuple[str, Callable[[argparse.Namespace], bool], str], ...] = (
    ("--tensor-model-parallel-size", _more_than_one("tensor_model_parallel_size"), "leave it at 1"),
    ("--context-parallel-size", _more_than_one("context_parallel_size"), "leave it at 1"),
    ("--expert-tensor-parallel-size", _more_than_one("expert_tensor_parallel_size"), "leave it at 1"),
    ("--pipeline-model-parallel-size", _more_than_one("pipeline_model_parallel_size"), "use --af-attention-groups"),
    ("--virtual-pipeline-model-parallel-size", _is_set("virtual_pipeline_model_parallel_size"), "drop it"),
    ("--num-layers-per-virtual-pipeline-stage", _is_set("num_layers_per_virtual_pipeline_stage"), "drop it"),
    ("--num-virtual-stages-per-pipeline-rank", _is_set("num_virtual_stages_per_pipeline_rank"), "drop it"),
    ("--pipeline-model-parallel-layout", _is_set("pipeline_model_parallel_layout"), "drop it"),
    ("--sequence-parallel", _is_set("sequence_parallel"), "drop it"),
    ("--overlap-grad-reduce", _is_set("overlap_grad_reduce"), "drop it"),
    ("--overlap-param-gather", _is_set("overlap_param_gather"), "drop it"),
    ("--overlap-param-gather-with-optimizer-step", _is_set("overlap_param_gather_with_optimizer_step"), "drop it"),
    ("--overlap-moe-expert-parallel-comm", _is_set("overlap_moe_expert_parallel_comm"), "AF-pipe overlaps: drop it"),
    ("--delay-wgrad-compute", _is_set("delay_wgrad_compute"), "drop it"),
    ("--moe-shared-expert-overlap", _is_set("moe_shared_expert_overlap"), "AF-pipe hides them anyway: drop it"),
    ("--use-megatron-fsdp", _is_set("use_megatron_fsdp"), "drop it"),
    ("--use-torch-fsdp2", _is_set("use_torch_fsdp2"), "drop it"),
    ("--enable-cuda-graph", _is_set("enable_cuda_graph"), "drop it"),
    ("--external-cuda-graph", _is_set("external_cuda_graph"), "drop it"),
    ("--cuda-graph-impl", lambda args: getattr(args, "cuda_graph_impl", "none") != "none", "leave it at none"),
    ("--recompute-granularity", _is_set("recompute_granularity"), "drop it"),
    ("--recompute-activations", _is_set("recompute_activations"), "drop it"),
    ("--moe-latent-size", _is_set("moe_latent_size"), "drop it"),
    ("--sft", _is_set("sft"), "packed sequences are not supported: drop it"),
    ("--dataloader-inter-document-masking", _is_set("dataloader_inter_document_masking"), "drop it"),
    ("--qk-clip", _is_set("qk_clip"), "drop it"),
    ("--use-cpu-initialization", _is_set("use_cpu_initialization"), "drop it"),
    ("--use-tp-pp-dp-mapping", _is_set("use_tp_pp_dp_mapping"), "drop it"),
    ("--num-distributed-optimizer-instances", _more_than_one("num_distributed_optimizer_instances"), "leave it at 1"),
    ("--init-model-with-meta-device", _is_set("init_model_with_meta_device"), "drop it"),
    ("--moe-expert-capacity-factor", lambda args: args.moe_expert_capacity_factor is not None, "AF-pipe is dropless"),
    ("--moe-pad-expert-input-to-capacity", _is_set("moe_pad_expert_input_to_capacity"), "drop it"),
    ("--moe-router-padding-for-fp8", _is_set("moe_router_padding_for_fp8"), "drop it"),
    ("--moe-router-padding-for-quantization", _is_set("moe_router_padding_for_quantization"), "drop it"),
    ("--moe-apply-probs-on-input", _is_set("moe_apply_probs_on_input"), "drop it"),
    ("--moe-router-fusion", _is_set("moe_router_fusion"), "drop it"),
    ("--moe-use-upcycling", _is_set("moe_use_upcycling"), "upcycle first, without --af-pipe"),
    ("--fp8-format", _is_set("fp8"), "drop it"),
    ("--fp4-format", _is_set("fp4"), "drop it"),
    ("--mtp-num-layers", _is_set("mtp_num_layers"), "drop it"),
    ("--fp32-residual-connection", _is_set("fp32_residual_connection"), "drop it"),
    ("--heterogeneous-layers-config-path", _is_set("heterogeneous_layers_config_path"), "drop it"),
    ("--experimental-attention-variant", _is_set("experimental_attention_variant"), "drop it"),
    ("--ddp-average-in-collective", _is_set("ddp_average_in_collective"), "drop it"),
    ("--optimizer-cpu-offload", _is_set("optimizer_cpu_offload"), "drop it"),
    ("--cpu-offloading-num-layers", _is_set("cpu_offloading_num_layers"), "drop it"),
    ("--fine-grained-activation-offloading", _is_set("fine_grained_activation_offloading"), "drop it"),
    ("--perform-rl-step", _is_set("perform_rl_step"), "drop it"),
    ("--data-parallel-random-init", _is_set("data_parallel_random_init"), "drop it"),
    ("--save-tokens-per-expert-interval", _is_set("save_tokens_per_expert_interval"), "drop it"),
    ("--hybrid-context-parallel", _is_set("hybrid_context_parallel"), "drop it"),
    ("--moe-paged-stash", _is_set("moe_paged_stash"), "drop it"),
    ("--gtp-weight-remat-size", _more_than_one("gtp_weight_remat_size"), "leave it at 1"),
    ("--expert-gtp-weight-remat-size", _more_than_one("expert_gtp_weight_remat_size"), "leave it at 1"),
)


def _refusals(args: argparse.Namespace) -> list[tuple[bool, str]]:
    found = [
        (applies(args), f"{flag} is not supported together with --af-pipe: {remedy}")
        for flag, applies, remedy in _UNSUPPORTED
    ]
    saves = bool(getattr(args, "save", None) or getattr(args, "load", None))
    if saves:
        found.append(
            (args.ckpt_format != "torch_dist", f"--ckpt-format {args.ckpt_format}: AF-pipe reads and writes torch_dist")
        )
        found.append(
            (
                args.use_distributed_optimizer and args.dist_ckpt_optim_fully_reshardable is False,
                "the distributed optimizer's state needs --dist-ckpt-optim-fully-reshardable with --af-pipe",
            )
        )
    return found
