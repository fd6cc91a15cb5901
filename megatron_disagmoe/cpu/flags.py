"""The flags of Megatron that a machine without CUDA and Transformer Engine needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Needed:
    """A flag, its value if it takes one, why, and flags that make it unnecessary or wrong."""

    name: str
    value: str | None
    why: str
    unless: tuple[str, ...] = ()
    only_value: bool = False

    def words(self) -> list[str]:
        """As on a command line."""
        return [self.name] if self.value is None else [self.name, self.value]


NEEDED = (
    Needed("--transformer-impl", "local", "the default is Transformer Engine, which needs CUDA", only_value=True),
    Needed("--distributed-backend", "gloo", "the default is NCCL, which needs CUDA", only_value=True),
    Needed("--no-persist-layer-norm", None, "a CUDA kernel of Apex"),
    Needed("--no-gradient-accumulation-fusion", None, "a CUDA kernel of Apex"),
    Needed("--no-masked-softmax-fusion", None, "a CUDA kernel"),
    Needed("--no-bias-gelu-fusion", None, "compiled for GPUs"),
    Needed("--no-bias-swiglu-fusion", None, "compiled for GPUs"),
    Needed("--no-bias-dropout-fusion", None, "compiled for GPUs"),
    Needed("--no-rope-fusion", None, "a kernel of Transformer Engine"),
    Needed("--num-workers", "0", "a loader process costs as much memory as a rank and the cores are busy"),
    Needed(
        "--no-create-attention-mask-in-dataloader",
        None,
        "the causal mask is made where it is used",
        unless=("--reset-attention-mask",),
    ),
)


def flags(argv: Sequence[str]) -> list[str]:
    """The words to append to ``argv`` (a training command's flags, without the script).

    What ``argv`` sets itself is kept. ``ValueError`` for a value that cannot work on a CPU.
    """
    if _given(argv, "--num-experts") is not None and _given(argv, "--disable-bias-linear") is None:
        raise ValueError(
            "experts with biases need Transformer Engine, and this machine has no GPU (Megatron's SequentialMLP "
            "changes a view in place): add --disable-bias-linear"
        )
    added: list[str] = []
    for needed in NEEDED:
        given = _given(argv, needed.name)
        if given is None:
            if not any(_given(argv, other) is not None for other in needed.unless):
                added += needed.words()
        elif needed.only_value and given != needed.value:
            raise ValueError(
                f"{needed.name} {given} needs a GPU and this machine has none ({needed.why}): "
                f"drop it, or give {' '.join(needed.words())}"
            )
    return added


def _given(argv: Sequence[str], name: str) -> str | None:
    """The last value ``argv`` gives to ``name`` ("" for a bare flag), ``None`` where it is absent."""
    found: str | None = None
    for position, word in enumerate(argv):
        if word == name:
            following = argv[position + 1] if position + 1 < len(argv) else ""
            found = "" if following.startswith("--") else following
        elif word.startswith(f"{name}="):
            found = word.removeprefix(f"{name}=")
    return found
