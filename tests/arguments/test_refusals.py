"""Every refused feature is refused when it is asked for through Megatron's own parser."""

from __future__ import annotations

import argparse

import pytest

from megatron_disagmoe.arguments.refusals import REFUSALS, Refusal, refused

#: Values for those whose parser wants a certain one.
VALUES = {
    "--cuda-graph-impl": "local",
    "--recompute-granularity": "selective",
    "--non-persistent-ckpt-type": "local",
    "--ckpt-format": "torch",
    "--optimizer": "muon",
    "--fp8-format": "hybrid",
    "--fp4-format": "e2m1",
    "--experimental-attention-variant": "dsa",
}
TOGETHER = {
    "--ckpt-format": ["--save", "checkpoints"],
    "the distributed optimizer's dp_reshardable format": ["--use-distributed-optimizer", "--load", "checkpoints"],
}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    module = pytest.importorskip("megatron.training.arguments")
    made: argparse.ArgumentParser = module.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return made


def words(refusal: Refusal, parser: argparse.ArgumentParser) -> list[str]:
    """A command line that asks for the feature."""
    if not refusal.flag.startswith("--"):
        return TOGETHER[refusal.flag]
    action = parser._option_string_actions[refusal.flag]
    takes_value = action.nargs != 0
    value = VALUES.get(refusal.flag, "2")
    return [refusal.flag, *([value] if takes_value else []), *TOGETHER.get(refusal.flag, [])]


def test_a_plain_command_line_is_not_refused(parser: argparse.ArgumentParser) -> None:
    assert refused(parser.parse_args([])) == []


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.flag)
def test_refused(refusal: Refusal, parser: argparse.ArgumentParser) -> None:
    messages = refused(parser.parse_args(words(refusal, parser)))
    assert str(refusal) in messages
    assert len(messages) == 1
