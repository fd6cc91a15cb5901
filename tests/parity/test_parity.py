"""AF-pipe trains as Megatron does: both run the same steps in real processes, and every number is compared.

Each test is one fork server, in which cases that share a vanilla run train it once. ``disagmoe parity --case all`` runs
every named case.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_disagmoe.parity import suite
from megatron_disagmoe.parity.compare import Comparison, compare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="starts its ranks by forking")


def compared(folder: Path, *names: str) -> dict[str, Comparison]:
    """Both runs of each case, all of which must hold."""
    cases = suite.cases(*names)
    results = dict(zip(cases, compare(list(cases.values()), folder), strict=True))
    failures = {name: result.failures() for name, result in results.items() if not result.holds}
    assert not failures
    return results


def bits(result: Comparison) -> bool:
    """Whether all losses are the same to the last bit."""
    return [step.loss for step in result.vanilla] == [step.loss for step in result.af_pipe]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("names", [("smallest", "n2", "p2", "a1-f2", "a2-f1"), ("m2", "m2-n2", "r2")])
def test_topologies(tmp_path: Path, names: tuple[str, ...]) -> None:
    for result in compared(tmp_path, *names).values():
        assert len(result.af_pipe) == 20


@pytest.mark.timeout(240)
def test_layers_that_do_not_divide(tmp_path: Path) -> None:
    for result in compared(tmp_path, "ragged", "dense-first", "p2-dense-first", "tail-apart", "balanced").values():
        assert len(result.af_pipe) >= 10


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "names",
    [
        ("smallest", "n2", "p2"),
        ("m2", "m2-n2", "r2"),
        ("ragged", "p2-dense-first", "checkpoint", "no-clip"),
    ],
)
def test_bf16(tmp_path: Path, names: tuple[str, ...]) -> None:
    results = compared(tmp_path, *(f"{name}-bf16" for name in names))
    assert {result.case.dtype for result in results.values()} == {"bf16"}
    # Without a tied weight and without clipping no sum is taken in another order.
    if "no-clip" in names:
        assert bits(results["no-clip-bf16"])


@pytest.mark.timeout(240)
def test_precision_and_start(tmp_path: Path) -> None:
    results = compared(tmp_path, "checkpoint", "router-fp32", "no-clip", "ep2-n4")
    # Without a tied weight and without clipping no sum is taken in another order.
    assert bits(results["no-clip"])
    assert results["router-fp32"].case.dtype == "bf16"


@pytest.mark.timeout(240)
def test_gradients(tmp_path: Path) -> None:
    results = compared(
        tmp_path,
        *("per-token-p2-r2", "per-token-m2", "m3-n2", "n2-r2", "p2-distributed-optimizer"),
        *("norms-logged", "weight-decay", "fp16-overflow"),
    )
    skipped = [step.skipped for step in results["fp16-overflow"].af_pipe]
    assert any(skipped)
    assert not all(skipped)
    assert results["norms-logged"].af_pipe[0].zeros is not None
    assert results["norms-logged"].af_pipe[0].params_norm is not None


@pytest.mark.timeout(240)
def test_routing_and_models(tmp_path: Path) -> None:
    results = compared(
        tmp_path,
        *("aux-loss-p2", "aux-loss-per-token", "z-loss", "expert-bias", "idle-ranks-m2"),
        *("p2-tied-m2", "document-masks"),
    )
    assert "z_loss" in results["z-loss"].log_differences
    assert "load_balancing_loss" in results["aux-loss-p2"].log_differences


@pytest.mark.timeout(240)
def test_course_of_a_run(tmp_path: Path) -> None:
    results = compared(tmp_path, "evaluation", "one-micro-batch")
    evaluations = results["evaluation"].af_pipe_run.log.validations
    assert [(v.iteration, v.split) for v in evaluations] == [
        *((3, None), (6, None)),  # during training
        *((6, "validation"), (6, "test")),  # after it
    ]
