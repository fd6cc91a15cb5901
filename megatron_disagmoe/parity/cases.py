"""What is compared: a topology, a small model, a precision; and the flags of both runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

_MODEL = (
    "--hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 64 --max-position-embeddings 64 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 "
    "--ffn-hidden-size 128 --normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0"
)
_TRAINING = (
    "--micro-batch-size 2 --global-batch-size 16 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 "
    "--clip-grad 1.0 --weight-decay 0.1 --mock-data --tokenizer-type NullTokenizer --vocab-size 257 "
    "--log-interval 1 --eval-interval 1000 --eval-iters 1 --seed 1234 --moe-token-dispatcher-type alltoall"
)


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
        dtype: ``fp32`` or ``bf16``.
        schedule: ``--af-schedule``.
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

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"--dtype {self.dtype!r}: choose fp32 or bf16")
        for name in ("attention_groups", "attention_ranks", "ffn_ranks", "replicas", "layers", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.ffn_groups is not None and self.ffn_groups < 1:
            raise ValueError(f"--ffn-groups must be at least 1, got {self.ffn_groups}")

    @property
    def af_world_size(self) -> int:
        """Processes of the AF-pipe run."""
        ffn_groups = self.ffn_groups or self.attention_groups
        return self.replicas * (self.attention_groups * self.attention_ranks + ffn_groups * self.ffn_ranks)

    @property
    def vanilla_world_size(self) -> int:
        """Processes of the vanilla run: its data-parallel size, M*R."""
        return self.replicas * self.attention_ranks

    def vanilla_flags(self) -> list[str]:
        """Flags of the vanilla run."""
        flags = [*_MODEL.split(), *_TRAINING.split(), "--num-layers", str(self.layers)]
        flags += ["--train-iters", str(self.steps)]
        if self.dtype == "bf16":
            flags.append("--bf16")
        return [*flags, *self.extra]

    def af_flags(self) -> list[str]:
        """The same flags with AF-pipe's."""
        return [
            *self.vanilla_flags(),
            "--af-pipe",
            *("--af-attention-groups", str(self.attention_groups)),
            *(() if self.ffn_groups is None else ("--af-ffn-groups", str(self.ffn_groups))),
            *("--af-attention-ranks", str(self.attention_ranks)),
            *("--af-ffn-ranks", str(self.ffn_ranks)),
            *("--af-schedule", self.schedule),
            *self.af_extra,
        ]

    def with_extra(self, *flags: str) -> Case:
        """The same case with more flags."""
        return replace(self, extra=(*self.extra, *flags))
