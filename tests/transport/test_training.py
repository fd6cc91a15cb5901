"""Transports, dispatch modes and wire formats in training: the same bits from either back end, bytes in the log."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_disagmoe.local_job import Result
from megatron_disagmoe.parity.step_values import StepValues
from tests.runtime.jobs import MICRO_BATCHES, NUM_LAYERS, STEPS, Training, train

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="starts its ranks by forking"),
    pytest.mark.timeout(240),
]

_TWO_FFN_RANKS, _LANES = "--af-ffn-ranks 2", "--af-attention-groups 2"
JOBS = {
    "expert": Training(3, f"{_TWO_FFN_RANKS} --af-dispatch per-expert"),
    "node": Training(3, f"{_TWO_FFN_RANKS} --af-dispatch per-node"),
    "node-nixl": Training(3, f"{_TWO_FFN_RANKS} --af-dispatch per-node --af-transport nixl"),
    "lanes": Training(4, _LANES),
    "lanes-nixl": Training(4, f"{_LANES} --af-transport nixl"),
    "fp8": Training(2, "--af-wire-dtype fp8"),
    "fp8-nixl": Training(2, "--af-wire-dtype fp8 --af-transport nixl"),
}

LINE = re.compile(r"^ AF-pipe iteration (\d+) \| dispatch (\S+), wire (\S+), sent per step \| (.*)$", re.M)

Trained = tuple[dict[str, list[StepValues]], dict[str, Result]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What every job's steps gave, and what it printed."""
    steps, results = train(JOBS, tmp_path_factory.mktemp("transports"))
    for result in results.values():
        result.checked()
    return steps, results


@pytest.mark.parametrize(
    "name, same_as", [("node-nixl", "node"), ("lanes-nixl", "lanes"), ("fp8-nixl", "fp8")]
)
def test_the_same_bits(trained: Trained, name: str, same_as: str) -> None:
    steps, _ = trained
    assert len(steps[name]) == STEPS
    assert steps[name] == steps[same_as]


@pytest.mark.parametrize(
    "name, least, most", [("node", 0.0, 1e-5), ("lanes", 0.0, 1e-5), ("fp8", 1e-7, 1e-2)], ids=["node", "lanes", "fp8"]
)
def test_how_far_from_per_expert(trained: Trained, name: str, least: float, most: float) -> None:
    """Per-node and per-rank add in another order; fp8 rounds to 3 bits of mantissa."""
    steps, _ = trained
    pairs = zip(steps[name], steps["expert"], strict=True)
    differences = [abs(a.loss - b.loss) / b.loss for a, b in pairs if a.loss is not None and b.loss is not None]
    assert len(differences) == STEPS
    assert least <= max(differences) <= most


def test_bytes_in_the_log(trained: Trained) -> None:
    """Every step, before Megatron's line, by the rank that prints it."""
    _, results = trained
    # Top-2 of 4 experts, 32 tokens of 32 fp32 numbers: two rows a token per expert, one per node.
    for name, rows_per_token in (("expert", 2), ("node", 1), ("lanes", 1), ("fp8", 1)):
        *others, last = results[name].outputs
        assert not any("AF-pipe iteration" in output for output in others)
        lines = LINE.findall(last)
        assert [int(line[0]) for line in lines] == [1, 2, 3]
        rows = rows_per_token * 32 * MICRO_BATCHES * NUM_LAYERS
        for _, _, wire, text in lines:
            size = 32 + 4 if wire == "fp8" else 32 * 4
            assert f"N2M {rows * size} B, {rows} rows | " in text
            assert ("LANE" in text) == (name == "lanes")
            assert ("FANOUT.grad" in text) == (name == "node")
            hidden = sum(int(count) for count in re.findall(r" (\d+) rows", text))
            assert f" {hidden * 32 * (1 if wire == 'fp8' else 4)} hidden, " in text
