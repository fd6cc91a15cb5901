"""What counts as equal: the arithmetic of a comparison, on runs made up by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_disagmoe.local_job import Result
from megatron_disagmoe.parity.cases import Case
from megatron_disagmoe.parity.compare import Comparison, Run, largest_difference
from megatron_disagmoe.parity.step_values import StepValues
from megatron_disagmoe.training_log import TrainingLog

LINE = (
    " [2026-01-01 00:00:00.000000] iteration {step:8d}/       3 | consumed samples: {samples:12d} | "
    "elapsed time per iteration (ms): {ms} | learning rate: 1.000000E-03 | global batch size:     8 | "
    "lm loss: {loss:.6E} | load_balancing_loss: {aux:.6E} | loss scale: 1.0 | grad norm: 1.000 | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |"
)
LOSSES = (5.0, 4.5, 4.0)


def steps(losses: tuple[float, ...] = LOSSES) -> list[StepValues]:
    return [
        StepValues(number, loss, grad_norm=1.0, learning_rate=1e-3, loss_scale=1.0, samples=8 * number, micro_batches=4)
        for number, loss in enumerate(losses, start=1)
    ]


def log(aux: float = 1.0, ms: float = 100.0, validation: float | None = None) -> TrainingLog:
    lines = [
        LINE.format(step=number, samples=8 * number, loss=loss, aux=aux, ms=ms)
        for number, loss in enumerate(LOSSES, start=1)
    ]
    if validation is not None:
        lines.append(f" validation loss at iteration 3 on validation set | lm loss value: {validation:.6E} | ")
    return TrainingLog.read(lines)


def without_loss(run: list[StepValues]) -> list[StepValues]:
    return [replace(step, loss=None) for step in run]


def comparison(af_pipe: Run | None = None, vanilla: Run | None = None, dtype: str = "fp32") -> Comparison:
    same = Run([without_loss(steps()), steps()], log())
    return Comparison(Case(steps=3, dtype=dtype), vanilla or Run([steps()], log()), af_pipe or same)


def test_equal_runs_hold_however_long_they_took() -> None:
    result = comparison(Run([without_loss(steps()), steps()], log(ms=700.0)))
    assert result.failures() == []
    assert result.holds
    assert result.max_relative_loss_difference == result.max_relative_grad_norm_difference == 0.0
    assert set(result.log_differences) == {
        *("consumed samples", "learning rate", "global batch size", "lm loss", "load_balancing_loss", "loss scale"),
        *("number of skipped iterations", "number of nan iterations"),
    }


@pytest.mark.parametrize("dtype, relative, holds", [("fp32", 9e-6, True), ("fp32", 2e-5, False), ("bf16", 1e-2, True)])
def test_a_loss_that_is_off(dtype: str, relative: float, holds: bool) -> None:
    off = (5.0, 4.5 * (1 + relative), 4.0)
    result = comparison(Run([steps(off)], log()), dtype=dtype)
    assert result.max_relative_loss_difference == pytest.approx(relative)
    assert result.holds is holds
    assert any(line.startswith("loss: relative difference") for line in result.failures()) is not holds


def test_everything_that_may_be_wrong_is_said() -> None:
    few, rising = steps()[:2], steps((4.0, 4.5, 5.0))
    norms = [replace(step, grad_norm=1.001) for step in steps()]
    params = [replace(step, params_norm=3.0) for step in steps()]
    for run, said in (
        (Run([few], log()), "AF-pipe took 2 steps instead of 3"),
        (Run([rising], log()), "the losses do not fall"),
        (Run([norms], log()), "gradient norm: relative difference 1.00e-03, allowed 1e-04"),
        (Run([params], log()), "parameter norm: relative difference inf"),
        (Run([steps()], log(aux=1.001)), "load_balancing_loss: relative difference 1.00e-03"),
        (Run([steps()], log(validation=4.0)), "validation loss: relative difference inf"),
        (Run([few, steps()], log()), "rank 0 took 2 steps, the last rank 3"),
        (Run([norms, steps()], log()), "step 1: grad_norm is 1.001 on rank 0, 1.0 on the last"),
    ):
        assert any(said in line for line in comparison(run).failures()), (said, comparison(run).failures())


def test_evaluations_are_compared() -> None:
    vanilla = Run([steps()], log(validation=4.0))
    assert comparison(Run([steps()], log(validation=4.00002)), vanilla).holds
    assert not comparison(Run([steps()], log(validation=4.0002)), vanilla).holds


def test_a_counter_must_be_the_same_to_the_letter() -> None:
    lines = [LINE.format(step=n, samples=8 * n, loss=5.0, aux=1.0, ms=1) for n in (1, 2, 3)]
    lines[0] = lines[0].replace("learning rate: 1.000000", "learning rate: 1.000001")
    failures = comparison(Run([steps()], TrainingLog.read(lines))).failures()
    assert any(line.startswith("learning rate: relative difference") for line in failures)


@pytest.mark.parametrize(
    "expected, actual, difference",
    [
        ([2.0, 4.0], [2.0, 5.0], 0.25),
        ([None, 1.0], [None, 1.0], 0.0),
        ([math.nan], [math.nan], 0.0),
        ([math.inf], [math.inf], 0.0),
        ([1.0], [math.nan], math.inf),
        ([None], [1.0], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
        ([], [], math.inf),
    ],
)
def test_largest_difference(
    expected: list[float | None], actual: list[float | None], difference: float
) -> None:
    assert largest_difference(expected, actual) == difference


def ended(code: int, output: str) -> Result:
    return Result("vanilla-0", [code], [output], seconds=1.0, timed_out=False, left_over=[])


def test_flags_that_a_run_refuses_are_bad_input() -> None:
    output = "disagmoe: no CUDA device, so ...\nsetting up\ndisagmoe: unrecognized arguments: --lrr\n"
    with pytest.raises(ValueError, match=r"^unrecognized arguments: --lrr$"):
        ended(2, output).checked()


def test_a_run_that_fails_shows_the_end_of_its_output() -> None:
    output = "disagmoe: no CUDA device, so ...\nTraceback: out of memory\n"
    with pytest.raises(RuntimeError, match=r"exit codes \[1\][^$]*out of memory"):
        ended(1, output).checked()
    assert ended(0, output).checked().output == output
