"""What is compared: a topology, a small model, a precision; and the flags of both runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_disagmoe.parity import data
from megatron_disagmoe.schedules import text
from megatron_disagmoe.schedules.actions import Placement

_MODEL = (
    "--hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 64 --max-position-embeddings 64 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 "
    "--ffn-hidden-size 128 --normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0"
)
_TRAINING = (
    "--micro-batch-size 2 --global-batch-size 16 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 "
    "--clip-grad 1.0 --weight-decay 0.1 --log-interval 1 --eval-interval 1000 --eval-iters 1 --seed 1234 "
    "--moe-token-dispatcher-type alltoall"
)
_PRECISION = {"fp32": (), "bf16": ("--bf16",), "fp16": ("--fp16",)}
_STARTS = ("seed", "checkpoint")
_BASE_STEPS = 3
"""Steps behind the weights that ``start="checkpoint"`` begins with: enough that nothing is at its initial value."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        attention_groups: p_A.
        ffn_groups: p_F; as p_A where None.
        attention_ranks: M.
        ffn_ranks: N.
        replicas: R.
        layers: transformer layers.
        steps: optimizer steps.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        schedule: ``--af-schedule``.
        dispatch: ``--af-dispatch``.
        transport: ``--af-transport``.
        placement: which group holds which stage, instead of p_A, p_F and round-robin; ``schedule`` is then built for it
            and handed over as a file.
        start: ``seed``, or ``checkpoint``: both runs load the weights that a vanilla run has saved.
        extra: flags for both runs (they come last, so they win).
        af_extra: flags for the AF-pipe run alone.
    """

    attention_groups: int = 1
    attention_ranks: int = 1
    ffn_ranks: int = 1
    replicas: int = 1
    layers: int = 4
    steps: int = 20
    dtype: str = "fp32"
    schedule: str = "interleaved-1f1b"
    extra: tuple[str, ...] = field(default=())
    af_extra: tuple[str, ...] = field(default=())
    ffn_groups: int | None = None
    dispatch: str = "per-expert"
    transport: str = "torch"
    start: str = "seed"
    placement: Placement | None = None

    def __post_init__(self) -> None:
        for name, choices in (("dtype", tuple(_PRECISION)), ("start", _STARTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)!r}: choose from {', '.join(choices)}")
        for name in ("attention_groups", "attention_ranks", "ffn_ranks", "replicas", "layers", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.ffn_groups is not None and self.ffn_groups < 1:
            raise ValueError(f"--ffn-groups must be at least 1, got {self.ffn_groups}")

    @property
    def af_world_size(self) -> int:
        """Processes of the AF-pipe run."""
        attention_groups, ffn_groups = self.attention_groups, self.ffn_groups or self.attention_groups
        if self.placement is not None:
            attention_groups, ffn_groups = self.placement.num_attention_groups, self.placement.num_ffn_groups
        return self.replicas * (attention_groups * self.attention_ranks + ffn_groups * self.ffn_ranks)

    @property
    def vanilla_world_size(self) -> int:
        """Processes of the vanilla run: its data-parallel size, M*R."""
        return self.replicas * self.attention_ranks

    def base_flags(self, folder: Path) -> list[str]:
        """Flags of the vanilla run that saves the weights to start from."""
        base = replace(self, start="seed", steps=_BASE_STEPS)
        return [
            *base.vanilla_flags(folder),
            *("--save", str(self.checkpoint(folder)), "--save-interval", str(_BASE_STEPS), "--no-save-optim"),
        ]

    def checkpoint(self, folder: Path) -> Path:
        """Where the weights to start from lie, named by what they depend on."""
        base = replace(self, start="seed", steps=_BASE_STEPS)
        return folder / f"checkpoint-{_digest(str(self.vanilla_world_size), *base.vanilla_flags(folder))}"

    def vanilla_flags(self, folder: Path) -> list[str]:
        """Flags of the vanilla run; corpus and checkpoint lie in ``folder``."""
        flags = [*_MODEL.split(), *_TRAINING.split(), *data.flags(folder), "--num-layers", str(self.layers)]
        flags += ["--train-iters", str(self.steps), *_PRECISION[self.dtype]]
        if self.start == "checkpoint":
            flags += ["--load", str(self.checkpoint(folder)), "--finetune", "--no-load-optim", "--no-load-rng"]
        if "--step-batch-size-schedule" in self.extra:  # Megatron takes the one or the other
            at = flags.index("--global-batch-size")
            del flags[at : at + 2]
        return [*flags, *self.extra]

    def af_flags(self, folder: Path) -> list[str]:
        """The same flags with AF-pipe's."""
        groups = ["--af-attention-groups", str(self.attention_groups)]
        if self.ffn_groups is not None:
            groups += ["--af-ffn-groups", str(self.ffn_groups)]
        if self.placement is not None:
            groups = []  # the file says so
        return [
            *self.vanilla_flags(folder),
            "--af-pipe",
            *groups,
            *("--af-attention-ranks", str(self.attention_ranks)),
            *("--af-ffn-ranks", str(self.ffn_ranks)),
            *("--af-schedule", self.schedule if self.placement is None else str(self.schedule_file(folder))),
            *("--af-dispatch", self.dispatch),
            *("--af-transport", self.transport),
            *self.af_extra,
        ]

    def schedule_file(self, folder: Path) -> Path:
        """Where the schedule for ``placement`` lies."""
        return folder / f"schedule-{_digest(repr(self.placement), self.schedule, str(self.micro_batches))}.txt"

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, from the flags."""
        flags = [*_TRAINING.split(), *self.extra]
        batch, micro_batch = (
            int(flags[len(flags) - flags[::-1].index(name)]) for name in ("--global-batch-size", "--micro-batch-size")
        )
        return batch // (micro_batch * self.vanilla_world_size)

    def write_schedule(self, folder: Path) -> None:
        """Build and write the schedule for ``placement``, if there is one."""
        if self.placement is not None:
            from megatron_disagmoe import builders

            schedule = builders.build(
                self.schedule,
                self.placement,
                num_micro_batches=self.micro_batches,
                costs=builders.NOMINAL_COSTS,
            )
            text.save(schedule, self.schedule_file(folder))

    def with_extra(self, *flags: str) -> Case:
        """The same case with more flags for both runs."""
        return replace(self, extra=(*self.extra, *flags))


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
