"""Features of Megatron that do not go together with ``--af-pipe`` (yet), each with what to do instead."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

Applies = Callable[[argparse.Namespace], bool]

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Refusal:
    """A flag, when it counts as used, and the remedy."""

    flag: str
    applies: Applies
    remedy: str = "drop it"

    def __str__(self) -> str:
        return f"{self.flag} is not supported together with --af-pipe: {self.remedy}"


def refused(args: argparse.Namespace) -> list[str]:
    """A message for each feature that is asked for and not supported."""
    return [str(refusal) for refusal in REFUSALS if refusal.applies(args)]


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _set(flag: str, remedy: str = "drop it", *, dest: str | None = None) -> Refusal:
    return Refusal(flag, lambda args: bool(getattr(args, dest or _dest(flag), None)), remedy)


def _above_1(flag: str, remedy: str = "leave it at 1") -> Refusal:
    return Refusal(flag, lambda args: (getattr(args, _dest(flag), 1) or 1) > 1, remedy)


def _other_than(flag: str, *usual: str | None, remedy: str) -> Refusal:
    return Refusal(flag, lambda args: getattr(args, _dest(flag), usual[0]) not in usual, remedy)


_PARALLELISM = (
    _above_1("--tensor-model-parallel-size"),
    _above_1("--context-parallel-size"),
    _above_1("--expert-tensor-parallel-size"),
    _above_1("--pipeline-model-parallel-size", "use --af-attention-groups"),
    _set("--num-layers-per-virtual-pipeline-stage"),
    _set("--num-virtual-stages-per-pipeline-rank"),
    _set("--pipeline-model-parallel-layout"),
    _set("--decoder-first-pipeline-num-layers"),
    _set("--decoder-last-pipeline-num-layers"),
    _set("--account-for-embedding-in-pipeline-split"),
    _set("--account-for-loss-in-pipeline-split"),
    _set("--sequence-parallel"),
    _set("--hybrid-context-parallel"),
    _set("--use-tp-pp-dp-mapping"),
    _set("--use-megatron-fsdp"),
    _set("--use-torch-fsdp2"),
    _above_1("--num-distributed-optimizer-instances"),
    _above_1("--tensor-parallel-num-weight-shards"),
    _above_1("--expert-tensor-parallel-num-weight-shards"),
    _set("--fake-process-group"),
    _set("--lazy-mpu-init"),
    _set("--inprocess-restart"),
)

_OVERLAP = (
    _set("--overlap-grad-reduce"),
    _set("--overlap-param-gather"),
    _set("--overlap-param-gather-with-optimizer-step"),
    _set("--overlap-moe-expert-parallel-comm", "AF-pipe overlaps: drop it"),
    _set("--delay-wgrad-compute"),
    _set("--moe-shared-expert-overlap", "AF-pipe hides them anyway: drop it"),
    _set("--ddp-average-in-collective"),
)

_MEMORY = (
    _set("--enable-cuda-graph"),
    _set("--external-cuda-graph"),
    _other_than("--cuda-graph-impl", "none", remedy="leave it at none"),
    _set("--recompute-granularity"),
    _set("--recompute-activations"),
    _set("--moe-layer-recompute"),
    _set("--optimizer-cpu-offload"),
    _set("--cpu-offloading-num-layers"),
    _set("--fine-grained-activation-offloading"),
    _set("--moe-paged-stash"),
)

_MODEL = (
    _set("--spec", "AF-pipe cuts Megatron's own GPT layers: drop it"),
    _set("--hybrid-layer-pattern", "AF-pipe trains GPT models"),
    _set("--is-hybrid-model", "AF-pipe trains GPT models"),
    _set("--mtp-num-layers"),
    _set("--moe-latent-size"),
    _set("--fp32-residual-connection"),
    _set("--fused-residual-rmsnorm"),
    _set("--heterogeneous-layers-config-path"),
    _set("--experimental-attention-variant"),
    _set("--qk-clip"),
    _set("--use-cpu-initialization"),
    _set("--init-model-with-meta-device"),
    _set("--data-parallel-random-init"),
    _set("--freeze-all-layers"),
    _set("--fp8-format", dest="fp8"),
    _set("--fp4-format", dest="fp4"),
)

_MOE = (
    Refusal(
        "--moe-expert-capacity-factor",
        lambda args: getattr(args, "moe_expert_capacity_factor", None) is not None,
        "AF-pipe is dropless: drop it",
    ),
    _set("--moe-expert-rank-capacity-factor", "AF-pipe is dropless: drop it"),
    _set("--moe-pad-expert-input-to-capacity"),
    _set("--moe-router-padding-for-fp8"),
    _set("--moe-router-padding-for-quantization"),
    _set("--moe-apply-probs-on-input"),
    _set("--moe-router-fusion"),
    _set("--moe-enable-routing-replay"),
    _set("--moe-use-upcycling", "upcycle first, without --af-pipe"),
    _set("--save-tokens-per-expert-interval"),
)

_TRAINING = (
    _set("--sft", "packed sequences are not supported: drop it"),
    _set("--dataloader-inter-document-masking"),
    _set("--perform-rl-step"),
    _set("--iterations-to-skip"),
    _set("--full-validation"),
    _set("--save-params-interval"),
    _set("--save-activations-interval"),
    _set("--save-wgrads-interval"),
    _set("--save-dgrads-interval"),
    _set("--logits-save-dir"),
    _set("--logits-load-dir"),
    _set("--yaml-cfg", "AF-pipe reads the command line"),
    _other_than("--optimizer", *OPTIMIZERS, remedy=f"choose from {', '.join(OPTIMIZERS)}"),
)


def _uses_checkpoints(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "save", None) or getattr(args, "load", None))


_CHECKPOINTS = (
    Refusal(
        "--ckpt-format",
        lambda args: _uses_checkpoints(args) and args.ckpt_format != "torch_dist",
        "it reads and writes torch_dist",
    ),
    Refusal(
        "the distributed optimizer's dp_reshardable format",
        lambda args: _uses_checkpoints(args)
        and args.use_distributed_optimizer
        and not args.dist_ckpt_optim_fully_reshardable,
        "add --dist-ckpt-optim-fully-reshardable",
    ),
    _set("--async-save", "the ranks save together and wait: drop it"),
    _other_than("--non-persistent-ckpt-type", None, "global", remedy="leave it at global"),
)

REFUSALS = (*_PARALLELISM, *_OVERLAP, *_MEMORY, *_MODEL, *_MOE, *_TRAINING, *_CHECKPOINTS)
