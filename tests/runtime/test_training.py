"""Training under different schedules: the same sums in the same order give the same bits, however work is laid out.

Every pair below is compared step by step, losses and gradient norms, for equality.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_disagmoe import builders
from megatron_disagmoe.cli.trace import app
from megatron_disagmoe.parity.step_values import StepValues
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.text import save
from tests.runtime.jobs import MICRO_BATCHES, NUM_LAYERS, STEPS, Training, train
from tests.runtime.redispatch import redispatching

#: Shared experts, a dense layer first, auxiliary losses; the embedding is tied.
_RICH = (
    "--moe-shared-expert-intermediate-size 32 --moe-layer-freq [0,1,1,1] --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 "
)
_BF16 = "--bf16 --use-distributed-optimizer --untie-embeddings-and-output-weights --add-qkv-bias "
_BIAS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type none "
_DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1 "
_SPLIT = "--af-schedule split-backward "
_A1F2, _A2F1 = "--af-attention-groups 1 --af-ffn-groups 2 ", "--af-attention-groups 2 --af-ffn-groups 1 "

#: What is compared with what.
SAME = {
    "split": "whole",
    "recompute": "whole",
    "redispatch": "whole",
    "file": "whole",
    "uneven-all": "uneven",
    "bf16-split": "bf16",
    "dropout-recompute": "dropout",
}


def _jobs(file: Path, traces: Path) -> dict[str, Training]:
    return {
        "whole": Training(2, _RICH),
        "split": Training(2, f"{_RICH}{_SPLIT}--af-trace-dir {traces}"),
        "recompute": Training(2, _RICH + _SPLIT + "--af-recompute both"),
        "redispatch": Training(2, _RICH + "--af-redispatch"),
        "file": Training(2, f"{_RICH} --af-schedule {file} --af-recompute attention"),
        "uneven": Training(3, _A1F2 + _BIAS),
        "uneven-all": Training(3, _A1F2 + _BIAS + _SPLIT + "--af-redispatch --af-recompute both"),
        "bf16": Training(3, _A2F1 + _BF16),
        "bf16-split": Training(3, _A2F1 + _BF16 + _SPLIT),
        "dropout": Training(2, _DROPOUT),
        "dropout-recompute": Training(2, _DROPOUT + "--af-recompute both"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all jobs."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def steps(folder: Path) -> dict[str, list[StepValues]]:
    """What every job's steps gave."""
    schedule = builders.build(
        "split-backward",
        Placement.round_robin(num_layers=NUM_LAYERS - 1, num_attention_groups=1, num_ffn_groups=1),
        num_micro_batches=MICRO_BATCHES,
        costs=builders.NOMINAL_COSTS,
    )
    save(redispatching(schedule, every=2), folder / "schedule.txt")
    found, results = train(_jobs(folder / "schedule.txt", folder / "traces"), folder)
    for result in results.values():
        result.checked()
    return found


@pytest.mark.parametrize("name, same_as", SAME.items())
def test_equal_bit_for_bit(steps: dict[str, list[StepValues]], name: str, same_as: str) -> None:
    assert len(steps[name]) == STEPS
    assert [(s.loss, s.grad_norm) for s in steps[name]] == [(s.loss, s.grad_norm) for s in steps[same_as]]


@pytest.mark.parametrize("name", ["whole", "uneven", "bf16", "dropout"])
def test_losses_fall(steps: dict[str, list[StepValues]], name: str) -> None:
    losses = [step.loss for step in steps[name] if step.loss is not None]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


def test_traces_of_training(steps: dict[str, list[StepValues]], folder: Path) -> None:
    """Of a real run: the steps have the numbers that Megatron logs, every message has both ends, the schedule is known.

    That traces change no bits is among the pairs above.
    """
    assert len(steps["split"]) == STEPS
    done = CliRunner().invoke(app, [str(folder / "traces"), "--out", str(folder / "merged.json"), "--json"])
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert result["steps"] == list(range(2, STEPS + 1))
    assert result["unmatched"] == 0
    assert [rank["group"] for rank in result["ranks"]] == ["F0", "A0"]
    assert all(0 < busy < 1 for busy in result["compute_busy"])
    assert result["simulated_step_time_s"] > 0
