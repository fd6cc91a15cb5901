"""``disagmoe bench shaped``: its options, and one small run with everything real but the length."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_disagmoe.benchmarks.hosts import why_unavailable
from megatron_disagmoe.benchmarks.shaped import options
from megatron_disagmoe.benchmarks.shaped.cases import MODELS, ONE_COPY, VANILLA, af_variants
from megatron_disagmoe.benchmarks.shaped.predict import busy_times
from megatron_disagmoe.cli.bench import app
from megatron_disagmoe.tracing.chrome import COMPUTE, SEND, WAIT, Event

needs_hosts = pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "huge"], "--model 'huge': choose from balanced, ffn-heavy"),
        (["--hosts", "two"], "--hosts 'two'"),
        (["--hosts", "3"], "--hosts 3: an even number"),
        (["--hosts", "16"], "--hosts 16 does not divide the 8 experts"),
        (["--links", "fast"], "--links 'fast'"),
        (["--transports", "rdma"], "--transports 'rdma': choose from torch, nixl"),
        (["--dispatch", "per-rank,per-rank"], "each once"),
        (["--schedules", "gpipe"], "--schedules 'gpipe'"),
        (["--repeats", "0"], "--repeats 0"),
    ],
)
def test_bad_options_exit_2(flags: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["shaped", *flags])
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", result.output)


def test_without_root_it_says_so_and_exits_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = CliRunner().invoke(app, ["shaped"])
    assert result.exit_code == 2
    assert "run it as root" in result.output


def test_variants_have_names_of_their_own() -> None:
    variants = options.variants("torch,nixl", "per-expert,per-rank", "sequential,interleaved-1f1b")
    assert len({variant.name for variant in (VANILLA, ONE_COPY, *variants)}) == 10


def test_every_variant_trains_one_batch() -> None:
    model = MODELS["balanced"]
    af_pipe = af_variants(("torch",), ("per-rank",), ("sequential",))
    for mine in [variant.flags(model, 4) for variant in (VANILLA, ONE_COPY, *af_pipe)]:
        assert mine[: len(model.flags())] == model.flags()
        at = mine.index("--expert-model-parallel-size")
        assert mine[at + 1] == "4"


_RUN = """
import json, sys
from dataclasses import replace
from pathlib import Path
from megatron_disagmoe.benchmarks.shaped.cases import MODELS, af_variants
from megatron_disagmoe.benchmarks.shaped.fleet import StepTaken
from megatron_disagmoe.benchmarks.shaped.measure import measure
from megatron_disagmoe.benchmarks.shaped.predict import Predictor
from megatron_disagmoe.benchmarks.shaped.raw_link import LinkSpeed
sizes = dict(layers=2, hidden=64, heads=4, expert_hidden=32, seq_length=32, micro_batches=4)
small = replace(MODELS["balanced"], **sizes)
variants = af_variants(("torch",), ("per-rank",), ("interleaved-1f1b",))
rows = measure(small, variants, hosts=2, links=[None, 1.0], repeats=2, folder=Path(sys.argv[1]))


def simulated(transport, schedule, share, round_trip):
    # The last two steps of the run, as if on a link of 0.05 Gbit/s.
    variant = replace(variants[0], transport=transport, schedule=schedule)
    predictor = Predictor(Path(sys.argv[1]) / "traces" / variants[0].name, variant, small, 2)
    taken = [StepTaken(1.0, 0.0, 0.0, (10**6, 10**6))] * 2
    return predictor.step_ms(0.05, [4, 5], taken, speed=LinkSpeed(share, round_trip), unlimited=[2, 3])


kinds = ("torch", "nixl")
found = [[simulated(kind, "interleaved-1f1b", *speed) for speed in ((1, 0), (0.5, 0), (1, 0.1))] for kind in kinds]
print(json.dumps({"rows": rows, "simulated": found}))
"""


@needs_hosts
def test_a_small_run(tmp_path: Path) -> None:
    """Losses equal, bytes counted, the rival sends fewer than vanilla and AF-pipe no more; nothing is left behind."""
    result = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path)], capture_output=True, text=True, timeout=150, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    rows = found["rows"]
    assert [row["link_gbit_per_s"] for row in rows] == [None] * 4 + [1.0] * 4
    assert all(row["losses_equal"] for row in rows)
    assert [row["link_share"] for row in rows[:4]] == [1.0] * 4
    assert 0.3 < rows[4]["link_share"] < 1.05
    sent = {(row["system"], row["dispatch"]): sum(row["bytes_sent_by_host"]) for row in rows[4:]}
    assert sent["one-copy", "per-rank"] < sent["vanilla", "alltoall"]
    assert 0 < sent["af-pipe", "per-rank"] < 1.1 * sent["one-copy", "per-rank"]
    for row in rows:
        if row["system"] == "af-pipe":
            assert row["speedup"] == pytest.approx(row["vanilla_ms"] / row["af_pipe_ms"])
            assert row["simulated_ms"] > 0
    (full, half, words), (nixl_full, nixl_half, nixl_words) = found["simulated"]
    assert (full, half) == (nixl_full, nixl_half)
    assert half > full + 10, "a link that carries half of its limit holds ports twice as long"
    assert words == full, "torch waits for no notes"
    assert nixl_words > full + 100, "every message is known 0.1 s later"
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    makers = re.findall(r"disagmoe-(\d+)-", names)
    assert all(Path(f"/proc/{maker}").exists() for maker in makers), names


def test_the_models_say_why() -> None:
    assert all(dataclasses.asdict(model)["why"] for model in MODELS.values())


def test_what_a_rank_was_busy_with() -> None:
    """Waits for two inputs, an action that sends before its end, one that waits for nothing, one that sends nothing."""

    def event(category: str, name: str, start: int, end: int) -> Event:
        return Event(category, name, 0, 0, -1, 0, start, end)

    events = [
        event(WAIT, "N2M", 10, 20),
        event(WAIT, "LANE", 22, 25),
        event(COMPUTE, "F", 27, 40),
        event(SEND, "M2N", 36, 90),  # on its way long after the action
        event(COMPUTE, "W", 44, 50),
        event(WAIT, "dM2N", 53, 60),
        event(COMPUTE, "B", 61, 75),
        event(SEND, "dN2M", 70, 72),
    ]
    found = [(action.event.name, action.own, action.after) for action in busy_times(events)]
    # F: 25 to 36, its end and the way to W 36 to 44; W has no message: 44 to 50, then 3 until the wait; B: 60 to 70
    assert found == [("F", 11, 8), ("W", 6, 3), ("B", 10, 0)]
