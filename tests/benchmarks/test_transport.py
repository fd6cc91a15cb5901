"""The transport benchmark on small messages: every row there, counts right, bad input refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_disagmoe.benchmarks import hosts, transport
from megatron_disagmoe.benchmarks.ranks import ThisMachine, run_ranks
from megatron_disagmoe.benchmarks.transport import Settings, expected_distinct, measure
from megatron_disagmoe.benchmarks.transport_picture import draw
from megatron_disagmoe.cli import app
from tests.benchmarks.test_hosts import needs_hosts

SMALL = Settings(tokens=512, hidden_size=64, raw_bytes=1 << 14, repeats=2, overlap_repeats=1, seconds=0.002)
STREAMS = [
    *(("torch", mode) for mode in ("per-expert", "per-rank", "per-node")),
    *(("nixl", mode) for mode in ("per-expert", "per-rank", "per-node")),
    ("gloo-p2p", None),
    ("gloo-all-to-all", None),
]


def check_rows(rows: list[dict[str, Any]], m: int, n: int) -> None:
    assert [(row["transport"], row["dispatch"]) for row in rows] == STREAMS
    for row in rows:
        assert (row["attention_ranks"], row["ffn_ranks"]) == (m, n)
        assert row["payload_bytes"] == row["micro_batches"] * (row["forward_bytes"] + row["reverse_bytes"])
        assert row["forward_gbit_per_s"] > 0 < row["reverse_gbit_per_s"]
        if row["dispatch"] is None:
            assert row["forward_bytes"] == row["reverse_bytes"] == m * n * SMALL.raw_bytes
            continue
        assert row["reverse_bytes"] == row["hidden_rows"] * 64 * 4
        # 512 tokens each choose 4 of 12 experts at random: close to what is expected, exact where nothing is random.
        assert row["fewer_rows"] == pytest.approx(row["fewer_rows_expected"], rel=0.05)
        if row["dispatch"] == "per-expert" or n == 1:
            assert row["fewer_rows"] == row["fewer_rows_expected"]
    by_stream = {(row["transport"], row["dispatch"]): row for row in rows}
    for mode in ("per-expert", "per-rank", "per-node"):
        torch, nixl = by_stream["torch", mode], by_stream["nixl", mode]
        assert torch["forward_bytes"] == nixl["forward_bytes"]


def test_every_stream_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "Settings", lambda: SMALL)
    options = ["--sizes", "1x2", "--links", "none", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, ["bench", "transport", *options])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["rows"]
    check_rows(rows, 1, 2)
    assert {row["link_gbit_per_s"] for row in rows} == {None}
    assert {row["forward_fraction"] for row in rows} == {row["bytes_on_wire"] for row in rows} == {None}
    assert json.loads((tmp_path / "transport.json").read_text())["rows"] == rows
    assert (tmp_path / "transport.png").read_bytes().startswith(b"\x89PNG")


@needs_hosts
def test_every_stream_across_limited_hosts(tmp_path: Path) -> None:
    rows = measure(tmp_path, sizes=[(2, 1)], links=[2.0], settings=SMALL)
    check_rows(rows, 2, 1)
    for row in rows:
        assert row["link_gbit_per_s"] == 2.0
        assert row["forward_fraction"] == pytest.approx(row["forward_gbit_per_s"] / 2)
        assert row["bytes_on_wire"] > row["payload_bytes"]
    draw(rows, tmp_path / "picture.svg")


def test_expected_distinct_parts() -> None:
    """Against every choice of 3 of 6 experts."""
    assert expected_distinct(6, 3, 6) == 3
    assert expected_distinct(6, 3, 1) == 1
    assert expected_distinct(6, 3, 2) == pytest.approx((2 * 1 + 18 * 2) / 20)
    assert expected_distinct(6, 3, 3) == pytest.approx((12 * 2 + 8 * 3) / 20)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sizes", "1by2"], "--sizes '1by2': write it like 1x1,2x2"),
        (["--sizes", "1x5"], "1x5 ranks: both at least 1, and FFN ranks among the divisors of 12"),
        (["--links", "fast"], "--links 'fast': write it like none,1"),
        (["--links", "0"], "0.001 to 100 Gbit/s, got 0"),
    ],
)
def test_bad_input_exits_2(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "transport", *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_namespaces_it_says_so_and_exits_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "why_unavailable", lambda: hosts.HostsUnavailable("needs root"))
    result = CliRunner().invoke(app, ["bench", "transport", "--links", "1"])
    assert result.exit_code == 2
    assert "needs root; or measure without a limit only: --links none" in result.stderr


class _Here(ThisMachine):
    def __init__(self, folder: Path) -> None:
        self.environment = {"PYTHONPATH": str(folder)}


def test_ranks_that_fail_or_hang_are_reported_and_ended(tmp_path: Path) -> None:
    here = _Here(tmp_path)
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="sleeper: not done after 0.5 s"):
        run_ranks([here], "sleeper", {}, tmp_path, timeout_seconds=0.5)
    lines = "import os, time", "if os.environ['RANK'] == '1': raise SystemExit('no luck')", "time.sleep(60)"
    (tmp_path / "failer.py").write_text("\n".join(lines))
    with pytest.raises(RuntimeError, match=r"(?s)failer: exit codes \[None, 1\] .*--- rank 1\nno luck"):
        run_ranks([here, here], "failer", {}, tmp_path, timeout_seconds=20)
