"""A program of operations on in-order streams, run by the event engine: what every baseline is made of."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from megatron_disagmoe.simulator.engine import Tasks, Times, run


class Program:
    """Operations with durations and dependencies.

    A *stream* runs its operations one after the other, in the order in which they were added, as a CUDA stream does.
    Operations without a stream wait for what they depend on and for nothing else.
    """

    def __init__(self) -> None:
        self.duration: list[float] = []
        self.name: list[str] = []
        self.stream: list[Hashable | None] = []
        self._before: list[int] = []
        self._after: list[int] = []
        self._last: dict[Hashable, int] = {}

    def add(
        self, seconds: float, after: Iterable[int] = (), *, stream: Hashable | None = None, name: str = ""
    ) -> int:
        """Append an operation; its number, for others to wait for. Numbers below 0 in ``after`` mean nothing."""
        number = len(self.duration)
        self.duration.append(seconds)
        self.name.append(name)
        self.stream.append(stream)
        for before in after:
            if before >= 0:
                self.wait(number, before)
        if stream is not None:
            if stream in self._last:
                self.wait(number, self._last[stream])
            self._last[stream] = number
        return number

    def wait(self, number: int, before: int) -> None:
        """Let an operation wait for another, which may have been added later."""
        self._before.append(before)
        self._after.append(number)

    def run(self) -> Times:
        """Start and end of every operation.

        Raises:
            ValueError: operations wait for each other in a circle.
        """
        count = len(self.duration)
        nobody = np.full(count, -1, np.int64)
        return run(
            Tasks(
                duration=np.array(self.duration),
                first=nobody,
                second=nobody,
                priority=np.zeros(count, np.int64),
                before=np.array(self._before, np.int64),
                after=np.array(self._after, np.int64),
                num_resources=0,
            )
        )
