"""A rank that dies while a checkpoint is saved leaves the one before it valid, and the run resumes from there."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch

from megatron_disagmoe.checkpoints.difference import compare
from megatron_disagmoe.checkpoints.reading import TRACKER, Checkpoint, find
from megatron_disagmoe.local_job import run
from tests.checkpoint.runs import SAVED, STEPS, Runs, case

SCRIPT = Path(__file__).parent / "scripts" / "die_while_saving.py"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="trains in forked ranks, which cannot use CUDA")


@pytest.mark.timeout(120)
def test_the_last_checkpoint_stays_valid(tmp_path: Path) -> None:
    smallest = case("1 1 1 1")
    runs = Runs(tmp_path)
    runs.af_pipe("dies", smallest, *runs.saving("dies"))
    [died] = run([dataclasses.replace(runs.jobs.pop(), script=str(SCRIPT))], tmp_path / "dying")
    assert died.exit_codes[-1] == -signal.SIGKILL, died.output[-3000:]
    assert died.exit_codes[0] != 0

    saved = tmp_path / "saved" / "dies"
    assert (saved / TRACKER).read_text() == str(SAVED)
    assert find(saved) == runs.checkpoint("dies", SAVED)
    assert list(runs.checkpoint("dies").glob("*.distcp"))  # it had begun
    with pytest.raises(ValueError, match=r"was not finished \(no metadata\.json\)"):
        Checkpoint(runs.checkpoint("dies"))

    runs.af_pipe("whole", smallest, *runs.saving("whole"))
    runs.af_pipe("again", smallest, "--load", str(saved), *runs.saving("dies"))
    for result in run(runs.jobs, tmp_path / "again"):
        result.checked()
    assert runs.steps("again") == [steps[SAVED:] for steps in runs.steps("whole")]
    assert (saved / TRACKER).read_text() == str(STEPS)
    over_the_unfinished = Checkpoint(saved)
    assert compare(over_the_unfinished, Checkpoint(runs.checkpoint("whole")), optimizer=True).equal
