"""Cases, their flags, the corpus behind them, and the command's way to name them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_disagmoe.cli import app
from megatron_disagmoe.parity import data, suite
from megatron_disagmoe.parity.cases import Case


def test_sizes_of_both_worlds() -> None:
    case = Case(attention_groups=2, ffn_groups=3, attention_ranks=2, ffn_ranks=4, replicas=2)
    assert case.af_world_size == 2 * (2 * 2 + 3 * 4)
    assert case.vanilla_world_size == 4


def test_af_pipe_adds_only_its_own_flags(tmp_path: Path) -> None:
    case = Case(attention_groups=2, ffn_ranks=2, dtype="bf16", extra=("--clip-grad", "0"), dispatch="per-rank")
    vanilla, af_pipe = case.vanilla_flags(tmp_path), case.af_flags(tmp_path)
    assert af_pipe[: len(vanilla)] == vanilla
    assert vanilla[-2:] == ["--clip-grad", "0"]
    assert not any(word.startswith("--af") for word in vanilla)
    added = af_pipe[len(vanilla) :]
    assert [word for word in added if word.startswith("--")] == [
        *("--af-pipe", "--af-attention-groups", "--af-attention-ranks", "--af-ffn-ranks"),
        *("--af-schedule", "--af-dispatch", "--af-transport"),
    ]


def test_runs_from_a_checkpoint_load_what_the_base_saves(tmp_path: Path) -> None:
    case = Case(start="checkpoint", attention_ranks=2)
    base, run = case.base_flags(tmp_path), case.vanilla_flags(tmp_path)
    assert base[base.index("--save") + 1] == run[run.index("--load") + 1] == str(case.checkpoint(tmp_path))
    assert "--load" not in base
    assert Case(start="checkpoint").checkpoint(tmp_path) != case.checkpoint(tmp_path)  # another world
    longer = Case(start="checkpoint", attention_ranks=2, steps=50, ffn_ranks=2)
    assert longer.checkpoint(tmp_path) == case.checkpoint(tmp_path)  # the same weights


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("dtype", "fp8", "--dtype 'fp8': choose from fp32, bf16, fp16"),
        ("start", "thin air", "--start 'thin air': choose from seed, checkpoint"),
        ("ffn_ranks", 0, "--ffn-ranks must be at least 1, got 0"),
        ("ffn_groups", 0, "--ffn-groups must be at least 1, got 0"),
    ],
)
def test_bad_input(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**{field: value})  # type: ignore[arg-type]


def test_names_of_cases_are_unique_and_groups_hold_them() -> None:
    names = [name for make in suite.GROUPS.values() for name in make()]
    assert len(set(names)) == len(names)
    assert not set(names) & set(suite.GROUPS)
    assert list(suite.cases("all")) == names
    assert list(suite.cases("m2", "starts", "m2")) == ["m2", *suite.GROUPS["starts"]()]


def test_the_topologies_asked_for_are_there() -> None:
    sizes = {
        (c.attention_groups, c.attention_ranks, c.ffn_ranks, c.replicas)
        for c in suite.GROUPS["topologies"]().values()
        if c.steps == 20 and c.ffn_groups is None
    }
    assert sizes >= {(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 2, 2, 1), (2, 1, 1, 1), (1, 1, 1, 2)}


def test_the_corpus_is_what_its_index_says(tmp_path: Path) -> None:
    data.write(tmp_path)
    words = np.fromfile(data.prefix(tmp_path).with_suffix(".bin"), "<u2")
    index = data.prefix(tmp_path).with_suffix(".idx").read_bytes()
    assert index.startswith(b"MMIDIDX\x00\x00")
    documents = int(np.count_nonzero(words == data.END))
    assert words[-1] == data.END
    assert len(index) == 9 + 25 + documents * (4 + 8) + 8 * (documents + 1)
    lengths = np.frombuffer(index, "<i4", count=documents, offset=34)
    assert list(np.cumsum(lengths) - 1) == list(np.flatnonzero(words == data.END))
    # Something to learn: two of three words follow from the one before, and documents end at every length.
    after_0 = words[1:][words[:-1] == 0]
    assert np.bincount(after_0).max() / len(after_0) > 0.6
    assert set(lengths) == set(range(5, 40))


class TestCommand:
    def test_list(self) -> None:
        result = CliRunner().invoke(app, ["parity", "--list", "--json"])
        assert result.exit_code == 0
        assert list(json.loads(result.stdout)["groups"]) == list(suite.GROUPS)

    @pytest.mark.parametrize(
        "words, message",
        [
            (["--case", "nonsense"], "there is no parity case 'nonsense'"),
            (["--dtype", "fp8"], "--dtype 'fp8': choose from"),
            (["--ffn-ranks", "0"], "--ffn-ranks must be at least 1"),
        ],
    )
    def test_bad_input_trains_nothing(self, words: list[str], message: str) -> None:
        result = CliRunner().invoke(app, ["parity", "--json", *words])
        assert result.exit_code == 2
        assert result.stdout == ""
        assert message in result.stderr
