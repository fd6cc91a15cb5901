"""Faults of Megatron that are mended from outside."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_disagmoe import megatron_seams, upstream_fixes
from megatron_disagmoe.local_job import Job, run
from tests.cpu.runs import EXPERT_PARALLEL, FLAGS, step_losses

utils = importlib.import_module("megatron.core.datasets.utils")


@pytest.fixture
def restored() -> Iterator[None]:
    """Whatever ``fix_dataset_helpers`` patches in a test is put back."""
    yield
    while megatron_seams.is_patched(upstream_fixes.COMPILE_HELPERS):
        megatron_seams.restore(upstream_fixes.COMPILE_HELPERS)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's ``megatron/core/datasets``: the C++ source, not compiled, and no Makefile yet."""
    wheel = Path(str(utils.__file__)).parent
    (tmp_path / "helpers.cpp").write_bytes((wheel / "helpers.cpp").read_bytes())
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.setattr(sys.modules["megatron.core.datasets"], "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, upstream_fixes.HELPERS, raising=False)
    return tmp_path


@pytest.fixture
def make_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of Megatron's own ``compile_helpers``, which runs ``make``."""
    calls: list[str] = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: calls.append("make"))
    return calls


@pytest.mark.usefixtures("restored")
class TestDatasetHelpers:
    def test_the_wheels_own_is_not_compiled_again(self, make_calls: list[str]) -> None:
        upstream_fixes.fix_dataset_helpers()
        utils.compile_helpers()
        assert make_calls == []

    def test_a_checkout_takes_the_wheels_if_the_source_is_the_same(self, checkout: Path, make_calls: list[str]) -> None:
        upstream_fixes.fix_dataset_helpers()
        utils.compile_helpers()
        assert make_calls == []
        built = importlib.import_module(upstream_fixes.HELPERS).__file__
        assert built is not None
        assert Path(built).parent != checkout

    def test_a_checkout_with_another_source_is_compiled(self, checkout: Path, make_calls: list[str]) -> None:
        with (checkout / "helpers.cpp").open("a") as source:
            source.write("// changed\n")
        (checkout / "Makefile").touch()
        upstream_fixes.fix_dataset_helpers()
        utils.compile_helpers()
        assert make_calls == ["make"]

    def test_neither_built_nor_to_be_built_is_said(self, checkout: Path) -> None:
        (checkout / "helpers.cpp").write_text("// other")
        with pytest.raises(ValueError, match="neither built nor can it be.*pip install --force-reinstall"):
            upstream_fixes.fix_dataset_helpers()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_allocated_state_is_what_the_first_step_would_allocate(kind: type[torch.optim.Optimizer]) -> None:
    def state(stepped: bool) -> dict[str, torch.Tensor]:
        parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = kind([parameter], lr=0.1)  # type: ignore[call-arg]
        if stepped:
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        else:
            upstream_fixes._allocate_state(optimizer)
        return dict(optimizer.state[parameter])

    stepped, allocated = state(stepped=True), state(stepped=False)
    assert allocated["step"].item() == stepped["step"].item() - 1
    assert {key: (value.shape, value.dtype) for key, value in allocated.items()} == {
        key: (value.shape, value.dtype) for key, value in stepped.items()
    }
    assert not allocated["exp_avg"].any()
    assert not allocated["exp_avg_sq"].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="trains in forked ranks, which cannot use CUDA")
@pytest.mark.timeout(120)
def test_a_resumed_run_of_the_distributed_optimizer_continues_exactly(tmp_path: Path) -> None:
    """From both checkpoint formats. Dropout is on, so the random numbers must go on as well."""
    flags = [*FLAGS, *EXPERT_PARALLEL, "--use-distributed-optimizer"]
    jobs = [Job(name="whole", world_size=2, flags=flags)]
    formats = {"dp": [], "fully": ["--dist-ckpt-optim-fully-reshardable"]}
    for name, format_flags in formats.items():
        folder = str(tmp_path / name)
        save = ["--save", folder, "--save-interval", "2", "--exit-interval", "2"]
        jobs.append(Job(name=f"{name}-first", world_size=2, flags=[*flags, *format_flags, *save]))
        jobs.append(Job(name=f"{name}-second", world_size=2, flags=[*flags, *format_flags, "--load", folder]))
    losses = {result.name: step_losses(result.checked()) for result in run(jobs, tmp_path / "run")}
    assert len(losses["whole"]) == 5
    for name in formats:
        resumed = [*losses[f"{name}-first"], *losses[f"{name}-second"]]
        assert resumed == pytest.approx(losses["whole"], rel=0, abs=2e-6)  # printed with six digits after the point
