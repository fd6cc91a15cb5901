"""Checkpoints go from plain Megatron to AF-pipe, back, and between layouts; what does not fit is refused by name."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_disagmoe.checkpoints.difference import compare
from megatron_disagmoe.checkpoints.reading import Checkpoint
from megatron_disagmoe.local_job import Result, run
from megatron_disagmoe.parity.step_values import StepValues
from megatron_disagmoe.training_log import TrainingLog
from tests.checkpoint.runs import SAVED, Runs, case

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="trains in forked ranks, which cannot use CUDA")

ONE, TWO = case("1 1 1 1"), case("1 2 1 1")  # what plain Megatron trains on one rank, and on two
# Layers not in turn, which would be 0,1,0: the output layer is beside the second layer.
PIPE = replace(case("2 1 1 1"), af_extra=("--af-place-layers", "0,1,1"))
APART = case("1 2 2 1")
WEIGHTS_ALONE = ("--no-load-optim", "--no-load-rng")
MIXED = "--moe-layer-freq [0,1,1,1,1] --moe-shared-expert-intermediate-size 64 --untie-embeddings-and-output-weights"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Four runs that save, and others that load from them with all their state."""
    runs = Runs(tmp_path_factory.mktemp("loading"))
    runs.vanilla("EP=1", ONE, *runs.saving("EP=1"))
    runs.vanilla("EP=2", TWO, *runs.saving("EP=2"), expert_parallel=2)
    runs.af_pipe("p=2", PIPE, *runs.saving("p=2"))
    runs.af_pipe("N=2", APART, *runs.saving("N=2"))
    runs.af_pipe("p=2 from EP=1", PIPE, *runs.loading("EP=1"))
    runs.af_pipe("N=2 from EP=1", case("1 1 2 1"), *runs.loading("EP=1"))
    runs.af_pipe("N=1 from EP=2", TWO, *runs.loading("EP=2"))
    runs.vanilla("EP=1 from p=2", ONE, *runs.loading("p=2"))
    runs.vanilla("EP=2 from N=2", TWO, *runs.loading("N=2"), expert_parallel=2)
    runs.af_pipe("p=2 from N=2", PIPE, *runs.loading("N=2"))
    for result in run(runs.jobs, runs.folder / "jobs"):
        result.checked()
    return runs


@on_cpu
@pytest.mark.parametrize(
    "loaded, saved",
    [
        ("p=2 from EP=1", "EP=1"),
        ("N=2 from EP=1", "EP=1"),
        ("N=1 from EP=2", "EP=2"),
        ("EP=1 from p=2", "p=2"),
        ("EP=2 from N=2", "N=2"),
        ("p=2 from N=2", "N=2"),
    ],
)
def test_another_layout_goes_on_with_weights_and_optimizer(runs: Runs, loaded: str, saved: str) -> None:
    same_steps(runs.seen_with_loss(loaded), runs.seen_with_loss(saved)[SAVED:])


@on_cpu
def test_keys_and_shapes_are_vanillas(runs: Runs) -> None:
    vanilla, pipe, apart = (Checkpoint(runs.checkpoint(name)) for name in ("EP=1", "p=2", "N=2"))
    for ours in (pipe, apart):
        difference = compare(vanilla, ours, optimizer=True)
        assert (difference.missing, difference.unexpected, difference.shapes, difference.dtypes) == ([], [], {}, {})
        assert difference.num_compared > 20
        assert difference.max_abs_difference < 1e-5
        assert "rng_state/shard_0.0_1.1" in ours.objects  # of the first attention group
    extra = sorted(set(apart.objects) - set(vanilla.objects))
    assert [key for key in extra if "rng" in key] == [f"af.F0.n{n}.rng_state/shard_0.0_1.1" for n in (0, 1)]


@pytest.fixture(scope="module")
def others(runs: Runs) -> dict[str, Result]:
    """Weights alone, layers that are not alike, and what must be refused; by name of the job."""
    more = Runs(runs.folder)
    more.vanilla("weights: EP=1 from EP=1", ONE, *more.loading("EP=1"), *WEIGHTS_ALONE)
    more.vanilla("weights: EP=1 from N=2", ONE, *more.loading("N=2"), *WEIGHTS_ALONE)
    more.af_pipe("weights: N=2 from EP=1", case("1 1 2 1"), *more.loading("EP=1"), *WEIGHTS_ALONE)

    more.vanilla("evaluated: EP=1", ONE, *more.loading("EP=1"), "--skip-train")
    more.af_pipe("evaluated: p=2 from EP=1", PIPE, *more.loading("EP=1"), "--skip-train")

    mixed = case("1 1 1 1", MIXED, layers=5)
    more.vanilla("mixed", mixed, *more.saving("mixed"))
    mixed_pipe = case("2 1 1 1", MIXED, layers=5)
    balanced = ("--af-place-layers", "balanced", "--af-tail-weight", "2")  # one MoE layer beside the tail, three apart
    more.af_pipe("mixed: p=2", mixed_pipe, *more.loading("mixed"), *more.saving("mixed: p=2"), *balanced)

    bf16 = case("1 1 1 1", "--use-distributed-optimizer", dtype="bf16")
    more.vanilla("dp_reshardable", bf16, *more.saving("dp_reshardable"))
    fully = bf16.with_extra("--dist-ckpt-optim-fully-reshardable")
    more.af_pipe("refused: sharding", fully, *more.loading("dp_reshardable"))
    more.af_pipe("refused: kind", fully, *more.loading("EP=1"))
    more.af_pipe("refused: shape", ONE.with_extra("--num-experts", "8"), *more.loading("EP=1"))
    shared = ONE.with_extra("--moe-shared-expert-intermediate-size", "64")
    more.af_pipe("refused: missing", shared, *more.loading("EP=1"))
    more.af_pipe("refused: none", ONE, *more.loading("EP=1"), "--ckpt-step", "3")
    return {result.name: result for result in run(more.jobs, runs.folder / "others")}


@on_cpu
@pytest.mark.parametrize("loaded", ["weights: EP=1 from N=2", "weights: N=2 from EP=1"])
def test_weights_alone(runs: Runs, others: dict[str, Result], loaded: str) -> None:
    expected = "weights: EP=1 from EP=1"
    for name in (loaded, expected):
        others[name].checked()
    same_steps(runs.seen_with_loss(loaded), runs.seen_with_loss(expected))


@on_cpu
def test_evaluation_alone(others: dict[str, Result]) -> None:
    """``--skip-train``: validation and test set, no step."""
    vanilla, ours = (
        TrainingLog.read(others[f"evaluated: {name}"].checked().output.splitlines())
        for name in ("EP=1", "p=2 from EP=1")
    )
    assert vanilla.steps == ours.steps == []
    assert [(v.iteration, v.split) for v in ours.validations] == [(v.iteration, v.split) for v in vanilla.validations]
    assert {v.split for v in ours.validations} == {"validation", "test"}
    for mine, theirs in zip(ours.validations, vanilla.validations, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)


@on_cpu
def test_layers_that_are_not_alike(runs: Runs, others: dict[str, Result]) -> None:
    """A dense layer first: every layer has keys of its own, by its global number."""
    for name in ("mixed", "mixed: p=2"):
        others[name].checked()
    same_steps(runs.seen_with_loss("mixed: p=2"), runs.seen_with_loss("mixed")[SAVED:])
    vanilla, ours = (Checkpoint(runs.checkpoint(name)) for name in ("mixed", "mixed: p=2"))
    difference = compare(vanilla, ours, optimizer=True)
    assert (difference.missing, difference.unexpected, difference.shapes) == ([], [], {})
    assert difference.max_abs_difference < 1e-5
    assert "decoder.layers.2.mlp.experts.experts.linear_fc1.weight" in ours.tensors
    assert "output_layer.weight" in ours.tensors


@on_cpu
@pytest.mark.parametrize(
    "name, message",
    [
        ("sharding", "optimizer's state was saved as dp_reshardable.*add --no-load-optim"),
        ("kind", "state is of kind 'fp32', this run's of kind 'distributed'; add --no-load-optim"),
        ("shape", r"does not fit this run: another shape: .*mlp\.router\.weight is 2x4x64 there and 2x8x64 here"),
        ("missing", r"weights of the model that it lacks: decoder\.layers\.mlp\.shared_experts\.linear_fc1\.weight"),
        ("none", r"no complete checkpoint to load: .*iter_0000003"),
    ],
)
def test_what_does_not_fit_is_refused_once(others: dict[str, Result], name: str, message: str) -> None:
    result = others[f"refused: {name}"]
    assert result.exit_codes[0] == 2, result.output[-3000:]
    said = [line for line in result.output.splitlines() if line.startswith("disagmoe: /")]
    assert len(said) == 1, result.output[-3000:]
    assert re.search(message, said[0])
    assert "Traceback" not in result.output


def same_steps(actual: list[StepValues], expected: list[StepValues]) -> None:
    """The same iterations with the same values, to what another order of additions makes of them."""
    assert [step.iteration for step in actual] == [step.iteration for step in expected] != []
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert (mine.learning_rate, mine.samples) == (theirs.learning_rate, theirs.samples)


@pytest.fixture
def world_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, which plays an attention rank."""
    from megatron_disagmoe import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    monkeypatch.setattr(parallel_state, "state", lambda: Namespace(role="A0 r0 m0"))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
def test_weights_that_found_no_place_end_the_run() -> None:
    """Megatron loads again without strictness, and prints what it did not load."""
    from megatron_disagmoe.training import checkpoint_loading

    model = torch.nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2), "scale": torch.ones(2), "weight._extra_state": None}
    with checkpoint_loading._noting_misplaced_weights([model]) as misplaced:
        model.load_state_dict(state, strict=True)
    assert torch.equal(model.weight, torch.ones(2, 2))
    assert misplaced == ["A0 r0 m0: missing bias", "A0 r0 m0: unexpected scale"]
    with pytest.raises(ValueError, match=r"/folder: weights were not loaded: A0 r0 m0: missing bias, .*scale"):
        checkpoint_loading._end_if_any(misplaced, "/folder")
    checkpoint_loading._end_if_any([], "/folder")
    with pytest.raises(RuntimeError, match="Missing key"):  # as before, outside
        model.load_state_dict({}, strict=True)
