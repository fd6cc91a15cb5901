"""What a run says at its start and who logs it; local initial weights."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from megatron_disagmoe.local_job import Job, Result, run
from megatron_disagmoe.parity import data
from megatron_disagmoe.parity.cases import Case
from megatron_disagmoe.training_log import TrainingLog

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="starts its ranks by forking")

SHORT = ("--global-batch-size", "4", "--lr-warmup-iters", "0")
ROLES = Case(attention_groups=2, ffn_ranks=2, layers=3, steps=2, extra=SHORT)
LOCAL = Case(ffn_ranks=2, replicas=2, layers=2, steps=6, extra=SHORT, af_extra=("--lr", "3e-3", "--af-init", "local"))
SAME_WEIGHTS = ("--check-weight-hash-across-dp-replicas-interval", "3")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All jobs of this file, in one fork server."""
    folder = tmp_path_factory.mktemp("reports")
    data.write(folder)
    jobs = [
        Job("vanilla", 1, ROLES.vanilla_flags(folder)),
        Job("roles", ROLES.af_world_size, ROLES.af_flags(folder)),
        Job("local", LOCAL.af_world_size, [*LOCAL.af_flags(folder), *SAME_WEIGHTS]),
    ]
    return {result.name: result.checked() for result in run(jobs, folder / "jobs")}


def table(output: str) -> list[dict[str, str]]:
    """The rows of the table of roles, by column."""
    lines = output.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("AF-pipe: ")) + 1
    columns = lines[start].split()
    places = [*(lines[start].index(column) for column in columns), None]
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        cells = [line[a:b].strip() for a, b in itertools.pairwise(places)]
        rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def test_the_table_of_roles(results: dict[str, Result]) -> None:
    outputs = results["roles"].outputs
    rows = table(outputs[0])
    assert [(row["rank"], row["role"], row["group"], row["replica"], row["layers"]) for row in rows] == [
        ("0", "FFN", "F0[0]", "0", "1,3"),
        ("1", "FFN", "F0[1]", "0", "1,3"),
        ("2", "FFN", "F1[0]", "0", "2"),
        ("3", "FFN", "F1[1]", "0", "2"),
        ("4", "attention, embedding", "A0[0]", "0", "1,3"),
        ("5", "attention, loss", "A1[0]", "0", "2"),
    ]
    assert all(row["host"] for row in rows)
    assert sum("AF-pipe: " in output for output in outputs) == 1


def test_parameters_add_up_to_megatrons(results: dict[str, Result]) -> None:
    [vanilla] = re.findall(r"number of parameters on .*: (\d+)", results["vanilla"].output)
    held = [int(row["parameters"].replace(",", "")) for row in table(results["roles"].outputs[0])]
    tied = (257 + 127) * 64  # the tied weight is on A0 and on A1; Megatron pads the vocabulary to 128
    assert sum(held) - tied == int(vanilla)


def test_the_last_rank_and_no_other_logs(results: dict[str, Result]) -> None:
    logs = [TrainingLog.read(output.splitlines()) for output in results["roles"].outputs]
    assert [len(log.steps) for log in logs] == [0, 0, 0, 0, 0, 2]


def test_local_weights_are_alike_on_data_parallel_ranks_and_train(results: dict[str, Result]) -> None:
    result = results["local"]
    assert "Weight hashes match after 3 iterations" in result.outputs[0]
    losses = [step.loss for step in TrainingLog.read(result.outputs[-1].splitlines()).steps]
    assert len(losses) == 6
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < losses[0]
