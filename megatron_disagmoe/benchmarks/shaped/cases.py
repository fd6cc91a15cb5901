"""What is compared: the model and its batch, and the variants that train it."""

from __future__ import annotations

from dataclasses import dataclass

_TRAINING = (
    "--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 --lr-decay-iters 1000 --clip-grad 1.0 "
    "--weight-decay 0.1 --mock-data --tokenizer-type NullTokenizer --vocab-size 257 --log-interval 1000 "
    "--eval-iters 0 --eval-interval 100000 --seed 1234 --train-iters 100000"
)


@dataclass(frozen=True)
class Model:
    """A model and one step's batch, the same for every variant.

    Attributes:
        why: what was chosen so, and what it shows.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    experts: int
    topk: int
    expert_hidden: int
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    why: str

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.seq_length * self.micro_batch_size

    def flags(self) -> list[str]:
        """Megatron's flags."""
        text = (
            f"--num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads {self.heads} "
            f"--seq-length {self.seq_length} --max-position-embeddings {self.seq_length} "
            f"--num-experts {self.experts} --moe-router-topk {self.topk} --moe-ffn-hidden-size {self.expert_hidden} "
            f"--ffn-hidden-size {self.expert_hidden} --normalization RMSNorm --position-embedding-type rope --swiglu "
            f"--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --moe-router-load-balancing-type aux_loss "
            f"--moe-aux-loss-coeff 0.01 --micro-batch-size {self.micro_batch_size} "
            f"--global-batch-size {self.micro_batch_size * self.micro_batches} {_TRAINING}"
        )
        if self.topk == 1:  # after a softmax over one expert its probability would be 1, whatever the router says
            text += " --moe-router-pre-softmax"
        return text.split()


MODELS = {
    "balanced": Model(
        "balanced", 4, 256, 8, 8, 4, 160, 128, 2, 8,
        "attention and the four experts of a token cost about the same, so one process a side is the right split; a "
        "copy of a token per expert takes a link of about 0.5 Gbit/s as long as the stage computes",
    ),
    "ffn-heavy": Model(
        "ffn-heavy", 4, 256, 8, 8, 1, 1024, 128, 2, 8,
        "one large expert a token: few bytes, and experts cost more than attention, so with one process a side "
        "attention waits for them whatever the link is: AF-pipe should not win",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way to train the model on ``hosts`` hosts, one process each.

    Attributes:
        system: ``vanilla`` (Megatron, expert parallel over all hosts), ``one-copy`` (likewise, with our rival
            dispatcher), or ``af-pipe`` (the first half of the processes FFN, the second attention).
        dispatch: Megatron's ``--moe-token-dispatcher-type``, or ``--af-dispatch``.
        transport, schedule: of AF-pipe.
    """

    system: str
    dispatch: str
    transport: str | None = None
    schedule: str | None = None

    @property
    def name(self) -> str:
        """Unique, and fit for a folder."""
        return "-".join(part for part in (self.system, self.dispatch, self.transport, self.schedule) if part)

    @property
    def is_af_pipe(self) -> bool:
        """Whether attention and experts are on different hosts."""
        return self.system == "af-pipe"

    def flags(self, model: Model, hosts: int) -> list[str]:
        """Every flag of its ranks; all variants begin with the weights of vanilla's run."""
        flags = [*model.flags(), "--expert-model-parallel-size", str(hosts)]
        if not self.is_af_pipe:
            kind = "alltoall" if self.system == "one-copy" else self.dispatch
            return [*flags, "--moe-token-dispatcher-type", kind]
        assert self.transport is not None, "an AF-pipe variant names its transport"
        assert self.schedule is not None, "an AF-pipe variant names its schedule"
        return [
            *flags,
            "--af-pipe",
            *("--af-attention-ranks", str(hosts // 2), "--af-ffn-ranks", str(hosts // 2), "--af-ranks-per-node", "1"),
            *("--af-transport", self.transport, "--af-dispatch", self.dispatch, "--af-schedule", self.schedule),
        ]


VANILLA = Variant("vanilla", "alltoall")
ONE_COPY = Variant("one-copy", "per-rank")
RIVALS = (VANILLA, Variant("vanilla", "allgather"), ONE_COPY)


def af_variants(transports: tuple[str, ...], dispatches: tuple[str, ...], schedules: tuple[str, ...]) -> list[Variant]:
    """Every combination."""
    return [
        Variant("af-pipe", dispatch, transport, schedule)
        for transport in transports
        for dispatch in dispatches
        for schedule in schedules
    ]
