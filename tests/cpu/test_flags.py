"""Which flags a machine without CUDA gets, worked out by hand."""

from __future__ import annotations

import pytest

from megatron_disagmoe.cpu import flags

EVERYTHING = (
    "--transformer-impl local --distributed-backend gloo --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
    "--no-rope-fusion --num-workers 0 --no-create-attention-mask-in-dataloader"
).split()


def without(*words: str) -> list[str]:
    return [word for word in EVERYTHING if word not in words]


@pytest.mark.parametrize(
    "given, added",
    [
        ("", EVERYTHING),
        ("--num-layers 2", EVERYTHING),
        ("--transformer-impl local", without("--transformer-impl", "local")),
        ("--transformer-impl=local", without("--transformer-impl", "local")),
        ("--distributed-backend gloo --no-rope-fusion", without("--distributed-backend", "gloo", "--no-rope-fusion")),
        ("--num-workers 2", without("--num-workers", "0")),  # the user's choice stays
        ("--reset-attention-mask", without("--no-create-attention-mask-in-dataloader")),  # needs the loader's mask
        ("--num-experts 4 --disable-bias-linear", EVERYTHING),
        (" ".join(EVERYTHING), []),
    ],
)
def test_only_what_is_missing_is_added(given: str, added: list[str]) -> None:
    assert flags(given.split()) == added


@pytest.mark.parametrize(
    "given, message",
    [
        ("--transformer-impl transformer_engine", "--transformer-impl transformer_engine needs a GPU .*impl local"),
        ("--transformer-impl=inference_optimized", "--transformer-impl inference_optimized needs a GPU"),
        ("--distributed-backend nccl", "--distributed-backend nccl needs a GPU .*--distributed-backend gloo"),
        ("--num-experts 4", "add --disable-bias-linear"),
    ],
)
def test_what_cannot_work_here_is_refused_with_the_remedy(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flags(given.split())


def test_megatron_knows_every_flag() -> None:
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = arguments.add_megatron_arguments(__import__("argparse").ArgumentParser(allow_abbrev=False))
    known, unknown = parser.parse_known_args(EVERYTHING)
    assert unknown == []
    assert known.num_workers == 0
