"""Training under different schedules: the same sums in the same order give the same bits, however work is laid out."""

from __future__ import annotations

import pytest

from megatron_disagmoe.parity.step_values import StepValues
from tests.runtime.jobs import STEPS, Training, train

_EVERYTHING = (
    "--moe-shared-expert-intermediate-size 32 --moe-layer-freq [0,1,1,1] --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 "
)
JOBS = {
    "whole": Training(2, _EVERYTHING),
    "split": Training(2, _EVERYTHING + "--af-schedule split-backward"),
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[StepValues]]:
    """What every job's steps gave."""
    found, results = train(JOBS, tmp_path_factory.mktemp("training"))
    for result in results.values():
        result.checked()
    return found


@pytest.mark.parametrize("name, same_as", [("split", "whole")])
def test_equal_bit_for_bit(steps: dict[str, list[StepValues]], name: str, same_as: str) -> None:
    assert len(steps[name]) == STEPS
    assert steps[name] == steps[same_as]


def test_losses_fall(steps: dict[str, list[StepValues]]) -> None:
    losses = [step.loss for step in steps["whole"]]
    assert None not in losses
    assert losses[-1] < losses[0]  # type: ignore[operator]
