"""Stage costs where attention stages differ: dense layers, sliding windows, the tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_disagmoe.simulator.costs import StageCosts


@dataclass(frozen=True, kw_only=True)
class LayeredCosts(StageCosts):
    """``StageCosts`` by stage.

    ``forward_times``, ``backward_times``, ``weight_times``: of every stage 0 .. 2L (A(i) is 2i, F(i) 2i + 1); backward
    includes what is run again. The fields of ``StageCosts`` hold means, for code that looks at nothing else.
    """

    forward_times: tuple[float, ...]
    backward_times: tuple[float, ...]
    weight_times: tuple[float, ...]

    def __post_init__(self) -> None:
        for time in (*self.forward_times, *self.backward_times, *self.weight_times):
            assert math.isfinite(time), "whoever makes them checks them"
            assert time >= 0, "whoever makes them checks them"

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.forward_times) // 2

    def forward(self, stage: int, *, num_layers: int) -> float:
        del num_layers
        return self.forward_times[stage]

    def input_gradient(self, stage: int, *, num_layers: int) -> float:
        del num_layers
        return self.backward_times[stage] - self.weight_times[stage]

    def dispatched_again(self, stage: int, *, num_layers: int) -> float:
        del stage, num_layers
        return 0.0  # ``backward_times`` has it

    def weight_gradient(self, stage: int, *, num_layers: int) -> float:
        del num_layers
        return self.weight_times[stage]

    @classmethod
    def of(
        cls,
        *,
        forward: Sequence[float],
        backward: Sequence[float],
        weight: Sequence[float],
        again: Sequence[float],
        m2n: float,
        n2m: float,
        lane: float,
    ) -> Self:
        """From the times of stages 0 .. 2L; ``again`` is the part of ``backward`` that is run again."""
        alike = slice(2, -1, 2) if len(forward) > 3 else slice(0, -1, 2)
        attention = _mean(forward[alike])
        once = sum(backward) - sum(again)
        return cls(
            attention=attention,
            ffn=forward[1],
            transfer=m2n,
            combine=n2m,
            lane=lane,
            backward_ratio=once / sum(forward),
            tail=forward[-1],
            embedding=max(0.0, forward[0] - attention),
            weight_fraction=min(1.0, sum(weight) / once),
            recompute_attention=min(1.0, _mean(again[alike]) / attention),
            recompute_ffn=min(1.0, again[1] / forward[1]),
            forward_times=tuple(forward),
            backward_times=tuple(backward),
            weight_times=tuple(weight),
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
