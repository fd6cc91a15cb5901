"""Named comparisons: every topology and every piece of numerics that disjoint roles could get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_disagmoe.parity.cases import Case
from megatron_disagmoe.schedules.actions import Placement


def _split(flags: str) -> tuple[str, ...]:
    return tuple(flags.split())


def _topologies() -> dict[str, Case]:
    """Where things are: M, N, p, R, depths that do not divide, dense layers."""
    dense_first = _split("--moe-layer-freq [0,1,1] --moe-shared-expert-intermediate-size 64")
    return {
        "smallest": Case(),
        "m2": Case(attention_ranks=2),
        "n2": Case(ffn_ranks=2),
        "m2-n2": Case(attention_ranks=2, ffn_ranks=2),
        "p2": Case(attention_groups=2),
        "r2": Case(replicas=2),
        "ragged": Case(attention_groups=2, layers=3),
        "dense-first": Case(layers=3, extra=dense_first),
        "p2-dense-first": Case(attention_groups=2, layers=3, extra=dense_first),
        "a1-f2": Case(ffn_groups=2),
        "a2-f1": Case(attention_groups=2, ffn_groups=1),
        "a2-f3": Case(attention_groups=2, ffn_groups=3, layers=5, steps=10),
        "tail-apart": Case(schedule="sequential", steps=10, placement=Placement(3, 2, (0, 1, 0, 1, 2), (0, 0, 1, 1))),
        "blocks": Case(schedule="sequential", steps=10, placement=Placement(2, 2, (1, 1, 0, 0, 1), (1, 0, 0, 1))),
        "balanced": Case(
            attention_groups=2, steps=10, af_extra=_split("--af-place-layers balanced --af-tail-weight 2")
        ),  # A(0) and the tail on one group, A(1) to A(3) on the other
        "dense-around": Case(attention_groups=2, layers=5, steps=10, extra=_split("--moe-layer-freq [0,1,0,1,0]")),
    }


_SHORT = _split("--global-batch-size 8")


def _short(flags: str = "", **sizes: object) -> Case:
    return Case(**{"layers": 3, "steps": 6, **sizes}, extra=(*_SHORT, *_split(flags)))  # type: ignore[arg-type]


def _starts() -> dict[str, Case]:
    """Where the weights come from: vanilla's expert-parallel initialisations, vanilla's checkpoints."""
    ep2 = "--expert-model-parallel-size 2"
    return {
        "checkpoint": Case(start="checkpoint"),
        "checkpoint-ep2": _short(ep2, start="checkpoint", attention_groups=2, attention_ranks=2),
        "ep2-n1": _short(ep2, attention_ranks=2),
        "ep2-n2": _short(ep2, attention_ranks=2, ffn_ranks=2),
        "ep2-n4": _short(ep2, attention_ranks=2, ffn_ranks=4),
        "ep4-n2": _short("--expert-model-parallel-size 4", attention_ranks=4, ffn_ranks=2, steps=4),
    }


def _gradients() -> dict[str, Case]:
    """How gradients are scaled, normed and stepped with over both roles."""
    per_token = "--calculate-per-token-loss"
    fp16 = "--initial-loss-scale 4194304 --loss-scale-window 3 --hysteresis 1"
    return {
        "per-token-m2": _short(per_token, attention_ranks=2),
        "per-token-n2": _short(per_token, ffn_ranks=2),
        "per-token-p2-r2": _short(per_token, attention_groups=2, replicas=2),
        "n2-r2": _short(ffn_ranks=2, replicas=2),
        "m3-n2": _short("--global-batch-size 12", attention_ranks=3, ffn_ranks=2, steps=4),
        "distributed-optimizer": _short("--use-distributed-optimizer", attention_ranks=2, ffn_ranks=2),
        "distributed-optimizer-r2": _short("--use-distributed-optimizer", ffn_ranks=2, replicas=2),
        "p2-distributed-optimizer": _short("--use-distributed-optimizer", attention_groups=2, attention_ranks=2),
        "sgd": _short("--optimizer sgd --lr 0.05"),
        "no-clip": _short("--clip-grad 0 --untie-embeddings-and-output-weights", attention_groups=2),
        "norms-logged": _short(
            "--log-params-norm --log-num-zeros-in-grad --timing-log-level 2 --log-throughput",
            attention_groups=2,
            ffn_ranks=2,
        ),
        "weight-decay": _short(
            "--start-weight-decay 0.01 --end-weight-decay 0.5 --weight-decay-incr-style linear", ffn_ranks=2
        ),
        "decoupled-lr": _short(
            "--untie-embeddings-and-output-weights --decoupled-lr 3e-3 --decoupled-min-lr 1e-4", attention_groups=2
        ),
        "fp16-overflow": _short(fp16, dtype="fp16", steps=10, attention_ranks=2, ffn_ranks=2),
        "fp16-overflow-p2": _short(
            f"{fp16} --use-distributed-optimizer", dtype="fp16", steps=10, attention_groups=2, ffn_ranks=2
        ),
    }


def _routing() -> dict[str, Case]:
    """Routers and what they make of the load: losses of their own, biases, experts and ranks without a token."""
    sigmoid = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2"
    # Fewer tokens in a micro-batch than FFN ranks and than experts, and one expert each: some of either get none.
    few_tokens = (
        "--num-experts 8 --moe-router-topk 1 --moe-router-pre-softmax --moe-aux-loss-coeff 0 --lr 3e-3 "
        "--seq-length 3 --max-position-embeddings 3 --micro-batch-size 1"
    )
    return {
        "aux-loss-p2": _short("--moe-aux-loss-coeff 0.1", attention_groups=2, attention_ranks=2),
        "aux-loss-per-token": _short("--moe-aux-loss-coeff 0.1 --calculate-per-token-loss", attention_ranks=2),
        "seq-aux-loss": _short("--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1", ffn_ranks=2),
        "global-aux-loss": _short(
            "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.1",
            attention_groups=2,
            attention_ranks=2,
        ),
        "z-loss": _short("--moe-z-loss-coeff 0.1", attention_groups=2, ffn_ranks=2),
        "expert-bias": _short(
            f"--moe-router-load-balancing-type none {sigmoid}", attention_groups=2, attention_ranks=2
        ),
        "router-fp32": _short("--moe-router-dtype fp32", dtype="bf16", ffn_ranks=2),
        "grouped-routing": _short(
            "--num-experts 8 --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-pre-softmax "
            "--moe-router-topk-scaling-factor 2.5",
            ffn_ranks=2,
        ),
        "idle-ranks": _short(few_tokens, ffn_ranks=4),
        "idle-ranks-m2": _short(few_tokens, attention_ranks=2, ffn_ranks=4),
        "sinkhorn": _short(
            "--moe-router-load-balancing-type sinkhorn --moe-router-topk 1 --moe-router-pre-softmax "
            "--moe-aux-loss-coeff 0",
            ffn_ranks=2,
        ),
        "shared-expert-gate": _short(
            "--moe-shared-expert-intermediate-size 64 --moe-shared-expert-gate", attention_groups=2
        ),
    }


def _models() -> dict[str, Case]:
    """Other layers around the experts."""
    return {
        "untied": _short("--untie-embeddings-and-output-weights"),
        "p2-untied": _short("--untie-embeddings-and-output-weights", attention_groups=2, layers=4),
        "p2-tied-m2": _short(attention_groups=2, attention_ranks=2),
        "learned-positions": _short(
            "--position-embedding-type learned_absolute --normalization LayerNorm", attention_groups=2
        ),
        "qk-norm-bias": _short("--qk-layernorm --add-qkv-bias --rotary-percent 0.5", attention_groups=2, ffn_ranks=2),
        "document-masks": _short("--reset-position-ids --reset-attention-mask", attention_groups=2),
    }


def _course() -> dict[str, Case]:
    """What happens along a run: evaluation, iterations left out, schedules of rates."""
    evaluation = "--eval-interval 3 --eval-iters 2 --eval-global-batch-size 12"
    return {
        "evaluation": _short(evaluation, attention_groups=2, attention_ranks=2),
        "growing-batches": Case(
            layers=3,
            steps=6,
            attention_groups=2,
            attention_ranks=2,
            ffn_ranks=2,
            extra=("--step-batch-size-schedule", "0:4 512:8 2048:12"),  # tokens: two steps of 4, three of 8, one of 12
        ),
        "one-micro-batch": _short("--global-batch-size 2", attention_groups=2, steps=10),
        "wsd": _short(
            "--lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 3 --lr-decay-iters 6", ffn_ranks=2
        ),
    }


def _options() -> dict[str, Case]:
    """AF-pipe's own choices: what travels how, in which order, and what is computed twice."""
    return {
        "per-rank": Case(dispatch="per-rank", attention_ranks=2, ffn_ranks=2),
        "p2-per-rank": Case(dispatch="per-rank", attention_groups=2, ffn_ranks=2),
        "per-rank-bf16": Case(dispatch="per-rank", attention_ranks=2, ffn_ranks=2, dtype="bf16"),
        "per-node": Case(dispatch="per-node", attention_ranks=2, ffn_ranks=4, af_extra=_split("--af-ranks-per-node 2")),
        "nixl": Case(transport="nixl", attention_ranks=2, ffn_ranks=2),
        "nixl-per-rank": _short(transport="nixl", dispatch="per-rank", attention_groups=2, ffn_ranks=2),
        "sequential": Case(schedule="sequential", attention_groups=2),
        "split-backward": Case(schedule="split-backward", attention_groups=2),
        "split-backward-a1-f2": _short(schedule="split-backward", ffn_groups=2, layers=4),
        "recompute": _short(af_extra=_split("--af-recompute both"), attention_groups=2),
        "redispatch": _short(af_extra=_split("--af-redispatch"), attention_groups=2),
    }


def _in(dtype: str, cases: dict[str, Case], names: tuple[str, ...]) -> dict[str, Case]:
    return {f"{name}-{dtype}": replace(cases[name], dtype=dtype) for name in names}


def _precision() -> dict[str, Case]:
    """bf16, with and without the distributed optimizer."""
    sizes = _topologies() | _starts() | _gradients() | _models()
    names = (*_topologies(), "checkpoint", "distributed-optimizer", "p2-distributed-optimizer", "no-clip", "p2-untied")
    return _in("bf16", sizes, names)


GROUPS: dict[str, Callable[[], dict[str, Case]]] = {
    "topologies": _topologies,
    "starts": _starts,
    "gradients": _gradients,
    "routing": _routing,
    "models": _models,
    "course": _course,
    "bf16": _precision,
    "options": _options,
}


def cases(*names: str) -> dict[str, Case]:
    """The cases with these names, or of groups with these names, in order and once each.

    Raises:
        ValueError: for a name that is neither.
    """
    groups = {name: make() for name, make in GROUPS.items()}
    known = {name: case for group in groups.values() for name, case in group.items()}
    chosen: dict[str, Case] = {}
    for name in names:
        if name == "all":
            chosen |= known
        elif name in groups:
            chosen |= groups[name]
        elif name in known:
            chosen[name] = known[name]
        else:
            raise ValueError(
                f"there is no parity case {name!r}; groups are all, {', '.join(groups)}; cases are {', '.join(known)}"
            )
    return chosen
