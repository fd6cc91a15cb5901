"""The quickstart's parts that need no Megatron: text, logs, curves, progress, commands."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_disagmoe.quickstart import corpus, dataset, jobs, plot
from megatron_disagmoe.quickstart.__main__ import _fresh_folder, _point_latest_to
from megatron_disagmoe.quickstart.progress import StepProgress
from megatron_disagmoe.training_log import Step, TrainingLog, Validation, parse

LINES = """
 [2026-11-24 08:15:12.431] iteration        1/       3 | consumed samples:            4 | elapsed time per iteration (ms): 1512.5 | learning rate: 1.000000E-03 | global batch size:     4 | lm loss: 5.500000E+00 | loss scale: 1.0 | grad norm: 1.252 | number of skipped iterations:   0 | number of nan iterations:   0 |
something else
 [2026-11-24 08:15:12.931] iteration        2/       3 | consumed samples:            8 | elapsed time per iteration (ms): 500.0 | learning rate: 1.000000E-03 | global batch size:     4 | loss scale: 1.0 | grad norm: nan | number of skipped iterations:   1 | number of nan iterations:   0 |
 validation loss at iteration 2 | lm loss value: 5.250000E+00 | lm loss PPL: 1.905663E+02 |
 [2026-11-24 08:15:13.431] iteration        3/       3 | consumed samples:           12 | elapsed time per iteration (ms): 500.0 | learning rate: 1.000000E-03 | global batch size:     4 | lm loss: 5.000000E+00 | loss scale: 1.0 | grad norm: 1.1 | number of skipped iterations:   0 | number of nan iterations:   0 |
 validation loss at iteration 3 on validation set | lm loss value: 5.125000E+00 | lm loss PPL: 1.681742E+02 |
""".splitlines()  # noqa: E501


def test_split_shares_no_paragraph() -> None:
    texts = {name: f"about {name}\n\nquoted everywhere\n\n" for name in "abcdefghij"}
    divided = corpus.split(texts)
    assert divided.valid == [texts["a"], texts["i"]]  # every eighth
    assert divided.train == [f"about {name}" for name in "bcdefghj"]


def test_real_text_is_english_and_large_enough() -> None:
    divided = corpus.split(corpus.topics())
    train, valid = "".join(divided.train), "".join(divided.valid)
    assert len(train) > 300_000
    assert len(valid) > 30_000
    assert " the " in train
    assert not set(train.split("\n\n")) & {paragraph for paragraph in valid.split("\n\n") if paragraph.strip()}


def test_log_of_megatron_is_read() -> None:
    log = TrainingLog.read(LINES)
    assert [(step.iteration, step.loss, step.seconds) for step in log.steps] == [
        (1, 5.5, 1.5125),
        (2, None, 0.5),
        (3, 5.0, 0.5),
    ]
    assert log.steps[0].fields["learning rate"] == 1e-3
    assert log.steps[2].grad_norm == 1.1
    assert log.validations == [Validation(2, None, 5.25), Validation(3, "validation", 5.125)]
    log.add(" validation loss at iteration 3 on test set | lm loss value: 4.000000E+00 | lm loss PPL: 5.459815E+01 |")
    assert log.validation == Validation(3, "validation", 5.125)
    assert parse("iteration without numbers") is None


def log_of(losses: dict[int, float | None]) -> TrainingLog:
    steps = [Step(i, 3, {} if loss is None else {"lm loss": loss}) for i, loss in losses.items()]
    return TrainingLog(steps=steps, validations=[Validation(1, None, 2.0)])


def test_differences_are_relative_and_of_common_steps() -> None:
    ours, theirs = log_of({1: 2.2, 2: None, 3: 1.0}), log_of({1: 2.0, 2: 1.5, 3: 1.0})
    assert plot.relative_differences(ours, theirs) == pytest.approx({1: 0.1, 3: 0.0})


@pytest.mark.parametrize("others", [{}, {"theirs": {1: 2.0, 3: 1.0}}, {"theirs": {1: 2.2, 3: 1.0}}])
def test_picture_is_a_png(tmp_path: Path, others: dict[str, dict[int, float | None]]) -> None:
    logs = {"ours": log_of({1: 2.2, 3: 1.0})} | {title: log_of(losses) for title, losses in others.items()}
    plot.draw_losses(logs, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    out = io.StringIO()
    with StepProgress(jobs.AF_PIPE, steps=40, console=Console(file=out, width=200)) as progress:
        for iteration in range(1, 41):
            progress.show(Step(iteration, 40, {"lm loss": 1.5, "elapsed time per iteration (ms)": 250.0}))
        progress.show(Validation(40, None, 1.25))
        progress.show(None)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert [line[1] for line in lines[1:4]] == ["1/40", "20/40", "40/40"]
    assert lines[1][2:] == ["loss", "1.5000", "0.25", "s", "a", "step"]
    assert lines[4] == "validation loss after step 40: 1.2500".split()


def test_jobs_differ_in_af_pipe_alone(tmp_path: Path) -> None:
    ours, theirs = (
        jobs.command(job, steps=7, data=tmp_path, checkpoints=tmp_path / "c") for job in (jobs.AF_PIPE, jobs.VANILLA)
    )
    assert ours[ours.index("--nproc-per-node") + 1] == "4"
    assert theirs[theirs.index("--nproc-per-node") + 1] == "1"
    position = ours.index("--af-pipe")
    assert [*theirs[:5], *theirs[6:]] == [*ours[:5], *ours[6:position]]
    assert all(word.startswith("--af-") or word.isdigit() for word in ours[position:])
    assert ours[ours.index("--train-iters") + 1] == "7"


def test_data_of_another_python_or_half_written_is_made_again(tmp_path: Path) -> None:
    assert not dataset.is_prepared(tmp_path)
    description = tmp_path / dataset.DESCRIPTION
    description.write_text('{"format"')
    assert not dataset.is_prepared(tmp_path)
    description.write_text(json.dumps({"format": dataset._FORMAT, "python": "3.0.0"}))
    assert not dataset.is_prepared(tmp_path)


def test_runs_keep_apart_and_latest_follows(tmp_path: Path) -> None:
    first, second = _fresh_folder(tmp_path / "runs"), _fresh_folder(tmp_path / "runs")
    assert first != second
    for folder in (first, second):
        _point_latest_to(folder, tmp_path / "latest")
        assert (tmp_path / "latest").resolve() == folder
