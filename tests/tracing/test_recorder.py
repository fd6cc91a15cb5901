from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_disagmoe.schedules.actions import Action, Edge, Kind
from megatron_disagmoe.tracing.chrome import Lanes, event_of, microseconds, nanoseconds
from megatron_disagmoe.tracing.clock import answer_clock_requests, measure_clock_offset
from megatron_disagmoe.tracing.merge import load_traces
from megatron_disagmoe.tracing.recorder import NullRecorder, TraceRecorder, create_recorder, edge_name, trace_path
from tests.tracing.traces import A0, F0, record_step


def _slices(path: Path) -> list[dict]:
    return [r for r in json.loads(path.read_text(encoding="utf-8"), parse_float=str) if r["ph"] == "X"]


def test_a_rank_file_is_a_chrome_trace(tmp_path: Path) -> None:
    with TraceRecorder(3, A0, tmp_path / "new" / "folder", replica=1) as recorder:
        recorder.compute(Action(Kind.B, 7, 12), 1_234_567_890_123_456_789, 1_234_567_890_123_456_790)
        recorder.wait("dN2M", 2, 5, 4, 10_000, 12_500)
        recorder.step(17, 9_000, 20_001)
    records = json.loads(trace_path(tmp_path / "new" / "folder", 3).read_text(encoding="utf-8"))
    names = {(r["name"], r["tid"]): r["args"] for r in records if r["ph"] == "M"}
    assert names["process_name", 0] == {"name": "A0 rank 3 replica 1"}
    assert names["thread_name", 1] == {"name": "compute"}
    assert names["disagmoe_rank", 0] == {"version": 1, "rank": 3, "group": "A0", "replica": 1}
    compute, wait, step = _slices(trace_path(tmp_path / "new" / "folder", 3))
    assert (compute["name"], compute["cat"], compute["pid"]) == ("B A(7) m12", "compute", 3)
    assert compute["args"] == {"kind": "B", "stage": "A(7)", "layer": 7, "micro_batch": 12}
    assert (compute["ts"], compute["dur"]) == ("1234567890123456.789", "0.001")  # to the nanosecond
    assert (wait["name"], wait["ts"], wait["dur"]) == ("dN2M(2) m5 from 4", "10.000", "2.500")
    assert (step["name"], step["args"]) == ("step 17", {"iteration": 17})


def test_transfers_that_overlap_get_lanes_of_their_own(tmp_path: Path) -> None:
    with TraceRecorder(0, A0, tmp_path) as recorder:
        for micro_batch, (start, end) in enumerate([(0, 10), (5, 15), (10, 20), (12, 14), (20, 30)]):
            recorder.send("M2N", 0, micro_batch, 1, start, end)
        recorder.receive("N2M", 0, 0, 1, 0, 5)
    assert [s["tid"] for s in _slices(trace_path(tmp_path, 0))] == [1000, 1001, 1000, 1002, 1000, 2000]


def test_lanes_give_late_slices_a_free_row() -> None:
    lanes = Lanes(100)
    assert [lanes.thread_for(*span) for span in [(50, 60), (0, 10), (60, 70), (20, 30)]] == [100, 101, 100, 101]
    assert lanes.count == 2


@pytest.mark.parametrize("time_ns", [0, 7, 999, 1000, 123_456_789, 2**62])
def test_times_are_exact(time_ns: int) -> None:
    assert nanoseconds(microseconds(time_ns)) == time_ns


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with TraceRecorder(1, F0, tmp_path) as recorder:
        recorder.receive("M2N", 4, 2, 9, 1001, 2002, num_bytes=77)
        recorder.compute(Action(Kind.W, 4, 2), 2002, 3003)
    receive, compute = map(event_of, _slices(trace_path(tmp_path, 1)))
    assert receive == ("receive", "M2N", 4, 2, 9, 77, 1001, 2002)
    assert compute == ("compute", "W", 4, 2, -1, 0, 2002, 3003)


def test_a_killed_run_leaves_its_finished_steps(tmp_path: Path) -> None:
    program = """
import os, sys
from tests.tracing.traces import *
recorders = [TraceRecorder(0, A0, sys.argv[1]), TraceRecorder(1, F0, sys.argv[1])]
record_step(recorders, 0)
record_step(recorders, 1)
recorders[0].compute(Action(Kind.F, 0, 0), 0, 1)
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60).returncode == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-00000.part", "rank-00001.part"]
    part = tmp_path / "rank-00001.part"
    part.write_bytes(part.read_bytes()[:-20])  # and the last write of rank 1 was cut short
    a, f = load_traces(tmp_path)
    assert [event.layer for event in a.of("step")] == [0, 1]
    assert [event.layer for event in f.of("step")] == [0]


def test_an_exception_closes_the_trace_at_exit(tmp_path: Path) -> None:
    program = """
import sys
from tests.tracing.traces import *
recorder = TraceRecorder(0, A0, sys.argv[1])
recorder.compute(Action(Kind.F, 0, 0), 0, 1)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60).returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00000.json"]
    assert len(_slices(trace_path(tmp_path, 0))) == 1


def test_an_older_trace_is_replaced(tmp_path: Path) -> None:
    for micro_batch in (1, 2):
        with TraceRecorder(0, A0, tmp_path) as recorder:
            recorder.compute(Action(Kind.F, 0, micro_batch), 0, 1)
        recorder.close()
    assert [s["args"]["micro_batch"] for s in _slices(trace_path(tmp_path, 0))] == [2]


def test_nothing_when_off(tmp_path: Path) -> None:
    recorder = create_recorder(None, 0, A0)
    assert isinstance(recorder, NullRecorder)
    assert not recorder.enabled
    recorder.compute(Action(Kind.F, 0, 0), 0, 1)
    recorder.step(0, 0, 1)
    recorder.close()
    assert list(tmp_path.iterdir()) == []
    with TraceRecorder(0, A0, tmp_path) as on:
        assert on.enabled


def test_edges_are_named_as_the_schedules_name_them() -> None:
    assert edge_name(Edge.M2N, False) == "M2N"
    assert edge_name(Edge.LANE, True) == "dLANE"


def test_recording_costs_little(tmp_path: Path) -> None:
    """Two per cent of a stage of a millisecond, with its two waits, two sends and two receives, are 20 us."""
    recorder = TraceRecorder(0, A0, tmp_path)
    action = Action(Kind.F, 3, 5)
    best = float("inf")
    for iteration in range(5):
        began = time.perf_counter_ns()
        for _ in range(500):
            recorder.compute(action, began, began)
            for call in (recorder.wait, recorder.send, recorder.receive):
                call("M2N", 3, 5, 1, began, began)
                call("LANE", 3, 5, 2, began, began)
        recorder.step(iteration, began, began)
        best = min(best, (time.perf_counter_ns() - began) / 500)
    recorder.close()
    assert best < 20_000


def test_clock_offset_is_found_within_its_error() -> None:
    now = [1_000_000]
    ahead = 123_456
    delays = iter([(40, 900), (100, 120), (10, 30), (500, 5)])  # there, back

    def exchange() -> int:
        there, back = next(delays)
        now[0] += there
        reference = now[0] + ahead
        now[0] += back
        return reference

    found = measure_clock_offset(exchange, rounds=4, clock=lambda: now[0])
    assert found.error_ns == 20  # the round trip of 40
    assert abs(found.offset_ns - ahead) <= found.error_ns
    with pytest.raises(ValueError, match="at least one round"):
        measure_clock_offset(exchange, rounds=0)


def test_clock_requests_are_answered_with_the_time_after_each() -> None:
    now = [0]
    replies: list[int] = []

    def request() -> None:
        now[0] += 10

    answer_clock_requests(request, replies.append, rounds=3, clock=lambda: now[0])
    assert replies == [10, 20, 30]


def test_events_from_other_threads_may_come_while_a_step_is_written(tmp_path: Path) -> None:
    number = 5000
    with TraceRecorder(0, A0, tmp_path) as recorder:

        def work() -> None:
            for i in range(number):
                recorder.send("M2N", 0, i, 1, i, i + 1)

        thread = threading.Thread(target=work)
        thread.start()
        steps = 0
        while thread.is_alive():
            recorder.step(steps, 0, 1)
            steps += 1
        thread.join()
    events = [event_of(s) for s in _slices(trace_path(tmp_path, 0))]
    assert [e.micro_batch for e in events if e.category == "send"] == list(range(number))
    assert sum(e.category == "step" for e in events) == steps


def test_steps_are_written_as_they_end(tmp_path: Path) -> None:
    recorders = [TraceRecorder(0, A0, tmp_path), TraceRecorder(1, F0, tmp_path)]
    record_step(recorders, 0)
    size = (tmp_path / "rank-00000.part").stat().st_size
    record_step(recorders, 1)
    assert (tmp_path / "rank-00000.part").stat().st_size > size > 0
    for recorder in recorders:
        recorder.close()


def _serve_clock(requests: Connection, replies: Connection) -> None:
    answer_clock_requests(requests.recv_bytes, replies.send, rounds=8)


def test_two_processes_of_one_machine_have_one_clock() -> None:
    context = multiprocessing.get_context("spawn")
    (asked, ask), (answer, answered) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    server = context.Process(target=_serve_clock, args=(asked, answered))
    server.start()

    def exchange() -> int:
        ask.send_bytes(b"?")
        return answer.recv()

    try:
        found = measure_clock_offset(exchange, rounds=8)
    finally:
        server.join(timeout=20)
        server.kill()
    assert server.exitcode == 0
    assert abs(found.offset_ns) <= found.error_ns
