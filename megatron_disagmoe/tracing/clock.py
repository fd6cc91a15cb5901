"""How far apart the clocks of two ranks are, by asking for the time over any channel there is.

Cristian's algorithm (F. Cristian, "Probabilistic clock synchronization", 1989): the answer was read somewhere
between question and answer; half way is the best guess, and the shortest round trip bounds the error by half
of itself. Crystals drift by some microseconds a second, so long runs should measure again now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

ROUNDS = 16


class ClockOffset(NamedTuple):
    """What to add to this rank's clock to have the reference's, as ``Recorder.clock_sync`` takes it."""

    offset_ns: int
    at_ns: int
    """When it was measured, on this rank's clock."""
    error_ns: int
    """The true offset differs by at most this."""


def measure_clock_offset(
    exchange: Callable[[], int], *, rounds: int = ROUNDS, clock: Callable[[], int] = time.perf_counter_ns
) -> ClockOffset:
    """Ask the reference rank for its clock ``rounds`` times; it runs ``answer_clock_requests`` meanwhile.

    Args:
        exchange: sends a request to the reference, waits, and returns the reference's clock in nanoseconds.
        rounds: how often; the first, which sets up connections, is as good as any if it is the fastest.
        clock: of this rank.

    Raises:
        ValueError: where ``rounds`` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"a clock offset needs at least one round, got {rounds}")
    best: ClockOffset | None = None
    for _ in range(rounds):
        asked = clock()
        reference = exchange()
        answered = clock()
        middle = (asked + answered) // 2
        reading = ClockOffset(reference - middle, middle, (answered - asked + 1) // 2)
        if best is None or reading.error_ns < best.error_ns:
            best = reading
    assert best is not None
    return best


def answer_clock_requests(
    wait_for_request: Callable[[], object],
    reply: Callable[[int], object],
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> None:
    """The reference rank's half of ``measure_clock_offset`` for one other rank."""
    for _ in range(rounds):
        wait_for_request()
        reply(clock())
