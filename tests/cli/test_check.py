"""``disagmoe check``: Megatron's own parser and checks, ours, and what Megatron asserts, without starting anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.runs import FLAGS

ROOT = Path(__file__).resolve().parents[2]

CHECK_EACH = """
import json, sys
from dataclasses import asdict
from megatron_disagmoe.dry_run import check_flags
cases = json.loads(open(sys.argv[1]).read())
verdicts = [asdict(check_flags(flags, world_size)) for flags, world_size in cases]
open(sys.argv[2], "w").write(json.dumps(verdicts))
"""

#: Flags beside FLAGS, processes, and what each message must say; no message: training could start.
CASES: list[tuple[str, int, list[str]]] = [
    ("", 2, []),
    ("", 3, [r"Megatron refuses .*eval_global_batch_size \(4\) must be divisible .*data_parallel_size \(3\)"]),
    ("--af-pipe --af-attention-groups 2", 4, []),
    ("--af-pipe --af-attention-groups 2", 3, ["3 processes do not fit .* start a multiple of 4"]),
    ("--af-attention-groups 2", 4, ["--af-attention-groups without --af-pipe"]),
    ("--af-pipe --af-attention-groups two", 2, ["argument --af-attention-groups: invalid int value: 'two'"]),
    ("--af-pipe --af-attention-group 2", 2, ["unrecognized arguments: --af-attention-group 2"]),
    ("--af-pipe --sequence-parallel --overlap-grad-reduce", 2, ["--overlap-grad-reduce is", "--sequence-parallel is"]),
    # Megatron's own complaints: one with a text, one without, one from its model's configuration.
    ("--af-pipe --lr-warmup-fraction 0.1 --lr-warmup-iters 2", 2, ["Megatron refuses .*lr-warmup"]),
    ("--af-pipe --min-lr 1.0", 2, [r"Megatron refuses .*assert args.min_lr <= args.lr \(.*arguments.py:\d+"]),
    ("--af-pipe --moe-shared-expert-intermediate-size 0", 2, ["Megatron refuses .*shared_expert_intermediate_size"]),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One process checks all cases: importing Megatron takes most of the time."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "cases.json").write_text(json.dumps([[[*FLAGS, *words.split()], world] for words, world, _ in CASES]))
    command = [sys.executable, "-c", CHECK_EACH, str(folder / "cases.json"), str(folder / "verdicts.json")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((folder / "verdicts.json").read_text())
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_verdict(verdicts: list[dict[str, Any]], number: int) -> None:
    expected, found = CASES[number][2], sorted(verdicts[number]["errors"])
    assert len(found) == len(expected), found
    for message, error in zip(expected, found, strict=True):
        assert re.search(message, error), error


def test_ranks(verdicts: list[dict[str, Any]]) -> None:
    assert [rank for verdict in verdicts[:2] for rank in verdict["ranks"]] == []
    assert [(rank["group"], rank["layers"]) for rank in verdicts[2]["ranks"]] == [
        ("F0", [1]),
        ("F1", [2]),
        ("A1", [2]),
        ("A0", [1]),
    ]


def disagmoe_check(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_disagmoe", "check", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_prints_one_json_object_and_exits_1_where_training_would_be_refused() -> None:
    ended = disagmoe_check("--world-size", "3", "--json", "--", *FLAGS, "--af-pipe")
    assert ended.returncode == 1, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["ok"] is False
    assert "3 processes do not fit" in answer["errors"][0]
    assert answer["ranks"] == []


def test_command_shows_who_would_be_what() -> None:
    ended = disagmoe_check("--world-size", "2", "--", *FLAGS, "--af-pipe")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    rows = [line.split() for line in ended.stdout.splitlines()]
    assert rows[:3] == [
        ["rank", "group", "replica", "index", "layers"],
        ["0", "F0", "0", "0", "1,", "2"],
        ["1", "A0", "0", "0", "1,", "2"],
    ]
    assert ended.stdout.splitlines()[-1] == "2 processes can train with these flags"


def test_command_without_a_world_size_is_bad_input() -> None:
    ended = disagmoe_check("--", *FLAGS)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--world-size" in ended.stderr
