"""A run that is saved and resumed in the same layout goes on as if it had not stopped, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_disagmoe.checkpoints.difference import compare
from megatron_disagmoe.checkpoints.reading import Checkpoint
from megatron_disagmoe.local_job import run
from megatron_disagmoe.parity.cases import Case
from tests.checkpoint.runs import SAVED, STEPS, Runs, case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="trains in forked ranks, which cannot use CUDA")

DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"
DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
DENSE_FIRST = "--moe-layer-freq [0,1,1] --moe-shared-expert-intermediate-size 64 --untie-embeddings-and-output-weights"

TOPOLOGIES = {sizes: case(sizes) for sizes in ("1 1 1 1", "1 2 1 1", "1 1 2 1", "1 1 1 2", "2 1 1 1")}
KINDS = {
    "bf16, experts apart": case("1 1 2 1", dtype="bf16"),
    "bf16, distributed optimizer, dropout": case("1 2 2 1", f"{DISTRIBUTED} {DROPOUT}", dtype="bf16"),
    "fp16, distributed optimizer": case("1 1 2 1", f"{DISTRIBUTED} --initial-loss-scale 4194304", dtype="fp16"),
    "dense layer first, uneven depth, dropout": case("2-1 1 1 1", f"{DENSE_FIRST} {DROPOUT}", layers=3),
}


def resumed(folder: Path, cases: dict[str, Case]) -> Runs:
    """Every case twice: whole, saving half-way; and resumed from there."""
    runs = Runs(folder)
    for name, one in cases.items():
        runs.af_pipe(f"{name}: whole", one, *runs.saving(f"{name}: whole"))
        runs.af_pipe(f"{name}: resumed", one, *runs.loading(f"{name}: whole"), *runs.saving(f"{name}: resumed"))
    for result in run(runs.jobs, folder / "jobs"):
        result.checked()
    return runs


@pytest.fixture(scope="module")
def topologies(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return resumed(tmp_path_factory.mktemp("topologies"), TOPOLOGIES)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return resumed(tmp_path_factory.mktemp("kinds"), KINDS)


@pytest.mark.parametrize("sizes", TOPOLOGIES)
def test_fp32(topologies: Runs, sizes: str) -> None:
    goes_on_exactly(topologies, sizes)


@pytest.mark.parametrize("name", KINDS)
def test_other_precisions_optimizers_and_models(kinds: Runs, name: str) -> None:
    goes_on_exactly(kinds, name)


def goes_on_exactly(runs: Runs, name: str) -> None:
    """Losses, gradient norms, learning rates, loss scales and sample counts of every rank; then all that is saved."""
    whole, resumed = runs.steps(f"{name}: whole"), runs.steps(f"{name}: resumed")
    assert len(whole) == len(resumed) > 1
    for of_whole, of_resumed in zip(whole, resumed, strict=True):
        assert [step.iteration for step in of_whole] == list(range(1, STEPS + 1))
        assert of_resumed == of_whole[SAVED:]
    assert whole[-1][-1].loss is not None
    first, second = (Checkpoint(runs.checkpoint(f"{name}: {half}")) for half in ("whole", "resumed"))
    difference = compare(first, second, optimizer=True)
    assert difference.equal, difference
    assert difference.num_compared > 20  # weights and two moments of each
