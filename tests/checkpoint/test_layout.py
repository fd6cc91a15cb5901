"""Whether two runs were laid out alike, from the arguments that Megatron saves."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

import pytest

from megatron_disagmoe.checkpoints.layout import Layout

AF = {
    "af_pipe": True,
    "af_attention_groups": 2,
    "af_ffn_groups": None,
    "af_attention_ranks": 1,
    "af_ffn_ranks": 2,
    "world_size": 6,
    "expert_model_parallel_size": 1,
}
PLAIN = {"world_size": 4, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}


def layout(base: Mapping[str, object], **changes: object) -> Layout:
    return Layout.of(Namespace(**{**base, **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"af_attention_groups": 1},
        {"af_ffn_groups": 1},
        {"af_attention_ranks": 2},
        {"af_ffn_ranks": 1},
        {"world_size": 12},
        {"af_place_layers": "0,1,1"},
        {"tensor_model_parallel_size": 2},
        {"af_pipe": False},
    ],
)
def test_every_size_counts(change: dict[str, object]) -> None:
    assert layout(AF, **change) != layout(AF)


def test_what_says_the_same() -> None:
    assert layout(AF, af_ffn_groups=2) == layout(AF)
    assert layout(AF, af_place_layers="in-turn") == layout(AF)
    # With AF-pipe it only names the initial weights, and which schedule ran does not matter.
    assert layout(AF, expert_model_parallel_size=2, af_schedule="sequential") == layout(AF)


def test_sizes_of_af_pipe_mean_nothing_without_it() -> None:
    assert layout(PLAIN, af_pipe=False, af_attention_ranks=3) == layout(PLAIN)
    assert layout(PLAIN, expert_model_parallel_size=1) != layout(PLAIN)


def test_a_checkpoint_without_arguments() -> None:
    assert Layout.of(None) != layout(AF)


def test_as_text() -> None:
    assert str(layout(AF)) == "AF-pipe p_A=2 p_F=2 M=1 N=2 on 6 ranks"
    assert str(layout(PLAIN)) == "plain Megatron TP=2 PP=1 EP=2 on 4 ranks"
