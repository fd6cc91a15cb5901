from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_disagmoe.tracing.chrome import Event
from megatron_disagmoe.tracing.merge import RankTrace, load_traces, match_transfers, on_reference, write_merged
from megatron_disagmoe.tracing.recorder import TraceRecorder
from tests.tracing.traces import A0, F0, MICRO, record


def test_clocks_are_aligned(tmp_path: Path) -> None:
    record(tmp_path, [1])
    a, f = load_traces(tmp_path)
    assert (a.rank, a.group, f.rank, f.group) == (0, A0, 1, F0)
    (forward,) = f.of("compute")
    assert (forward.start, forward.end) == (30 * MICRO, 50 * MICRO)
    assert a.events[0].start == 0


@pytest.mark.parametrize(
    "at, expected",
    [(500, 600), (1000, 1100), (1500, 1650), (2000, 2200), (2500, 2600), (3000, 3000), (9000, 9000)],
)
def test_drift_is_corrected_between_readings(at: int, expected: int) -> None:
    readings = [(1000, 100), (2000, 200), (3000, 0)]
    assert on_reference(readings, at) == expected


def test_without_readings_clocks_are_one() -> None:
    assert on_reference([], 5) == 5


def test_every_message_is_matched_in_order(tmp_path: Path) -> None:
    record(tmp_path, [1, 1, 1])
    transfers, unmatched = match_transfers(load_traces(tmp_path))
    assert unmatched == 0
    first = transfers[:2]
    assert [(t.sender, t.receiver, t.send.name, t.start, t.end) for t in first] == [
        (0, 1, "M2N", 20 * MICRO, 30 * MICRO),
        (1, 0, "N2M", 50 * MICRO, 60 * MICRO),
    ]
    assert len(transfers) == 6
    assert [t.start for t in transfers] == sorted(t.start for t in transfers)


def test_ends_without_another_are_counted() -> None:
    def rank(number: int, *events: Event) -> RankTrace:
        return RankTrace(number, A0, 0, events)

    lone_send = Event("send", "M2N", 0, 1, 1, 0, 0, 5)
    lone_receive = Event("receive", "M2N", 0, 0, 0, 0, 0, 5)
    assert match_transfers([rank(0, lone_send), rank(1, lone_receive)]) == ([], 2)
    # a receive posted after the send was seen complete (it was buffered) starts the transfer, and ends it at once
    early = Event("send", "M2N", 0, 0, 1, 0, 10, 20)
    late = Event("receive", "M2N", 0, 0, 0, 0, 30, 40)
    (transfer,), unmatched = match_transfers([rank(0, early), rank(1, late)])
    assert (unmatched, transfer.start, transfer.end) == (0, 30, 30)


def test_merged_trace_holds_every_slice_and_its_arrows(tmp_path: Path) -> None:
    record(tmp_path, [1, 2])
    ranks = load_traces(tmp_path)
    transfers, _ = match_transfers(ranks)
    write_merged(ranks, transfers, tmp_path / "merged.json")
    records = json.loads((tmp_path / "merged.json").read_text(encoding="utf-8"))["traceEvents"]
    slices = [r for r in records if r["ph"] == "X"]
    assert len(slices) == 2 * (6 + 5)
    assert {r["args"]["name"] for r in records if r["name"] == "process_name"} == {"A0 rank 0", "F0 rank 1"}
    for pid in (0, 1):
        for tid in {s["tid"] for s in slices if s["pid"] == pid}:
            same = sorted((s["ts"], s["ts"] + s["dur"]) for s in slices if (s["pid"], s["tid"]) == (pid, tid))
            assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(same))
    starts = {r["id"]: r for r in records if r["ph"] == "s"}
    ends = {r["id"]: r for r in records if r["ph"] == "f"}
    assert len(starts) == 4
    assert starts.keys() == ends.keys()
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"], end["bp"]) == (end["name"], end["cat"], "e")
        assert {start["pid"], end["pid"]} == {0, 1}
        assert start["ts"] < end["ts"]
        for flow, category in ((start, "send"), (end, "receive")):
            (inside,) = [
                s
                for s in slices
                if (s["pid"], s["tid"]) == (flow["pid"], flow["tid"]) and s["ts"] <= flow["ts"] < s["ts"] + s["dur"]
            ]
            assert (inside["cat"], inside["args"]["edge"]) == (category, flow["name"])


def test_a_send_never_seen_complete_ends_when_it_was_received(tmp_path: Path) -> None:
    with TraceRecorder(0, A0, tmp_path) as a, TraceRecorder(1, F0, tmp_path) as f:
        a.send("M2N", 0, 0, 1, 10_000, 10_000)
        f.receive("M2N", 0, 0, 0, 4_000, 35_000)
    ranks = load_traces(tmp_path)
    transfers, _ = match_transfers(ranks)
    assert [(t.start, t.end) for t in transfers] == [(6_000, 31_000)]  # from the first event on
    write_merged(ranks, transfers, tmp_path / "merged.json")
    records = json.loads((tmp_path / "merged.json").read_text(encoding="utf-8"))["traceEvents"]
    (send,) = [r for r in records if r["ph"] == "X" and r["cat"] == "send"]
    assert (send["ts"], send["dur"]) == (6.0, 25.0)


def test_folder_without_traces(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--af-trace-dir"):
        load_traces(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '[{"name":"other","ph":"X"}]', '{"traceEvents":[]}'])
def test_files_of_others_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "rank-00000.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"rank-00000\.json is not the trace of a rank"):
        load_traces(tmp_path)


def test_part_of_others_is_named(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.part").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"rank-00000\.part was not written by a trace recorder"):
        load_traces(tmp_path)


def test_other_versions_are_refused(tmp_path: Path) -> None:
    TraceRecorder(0, A0, tmp_path).close()
    path = tmp_path / "rank-00000.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"version": 1', '"version": 2'), encoding="utf-8")
    with pytest.raises(ValueError, match="format 2; this program reads 1"):
        load_traces(tmp_path)
