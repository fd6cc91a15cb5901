"""What stages and transfers cost, in any one unit of time."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """Times of one micro-batch's stages and transfers; every figure in the same unit, seconds or stage times.

    ``attention``, ``ffn``, ``tail``: forward of A(i) for i < L, of F(i), of A(L).
    ``embedding``: what A(0) takes on top of ``attention``.
    ``transfer``, ``combine``, ``lane``: an M2N, an N2M (as M2N where None), a lane between two groups. A gradient takes
    as long as what it answers. A lane that takes 0 is left out: its order is implied by the other two.
    ``backward_ratio``: backward over forward, recomputation not counted.
    ``weight_fraction``: the weight gradients' share of a backward, where it is split.
    ``recompute_attention``, ``recompute_ffn``: share of a stage's forward that is run again before its backward; all of
    it where an FFN stage is dispatched again, since then nothing of it is kept.
    """

    attention: float
    ffn: float
    transfer: float
    combine: float | None = None
    lane: float = 0.0
    backward_ratio: float = 2.0
    tail: float = 0.0
    embedding: float = 0.0
    weight_fraction: float = 0.5
    recompute_attention: float = 0.0
    recompute_ffn: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "combine":
                continue
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{field.name} is {value}; a stage cost is a finite number, 0 or more")
        for name in ("attention", "ffn"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0; a stage takes time: give its forward time")
        for name in ("weight_fraction", "recompute_attention", "recompute_ffn"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, so at most 1")

    def forward(self, stage: int, *, num_layers: int) -> float:
        """Forward time of a stage by its number along the model: A(i) is 2i, F(i) is 2i + 1, the tail 2L."""
        if stage % 2:
            return self.ffn
        if stage == 2 * num_layers:
            return self.tail
        return self.attention + (self.embedding if stage == 0 else 0.0)

    def input_gradient(self, stage: int, *, num_layers: int) -> float:
        """Time of ``I``: what is run again of the forward, and the gradients of the stage's inputs."""
        recompute = 0.0
        if stage % 2:
            recompute = self.recompute_ffn
        elif stage < 2 * num_layers:
            recompute = self.recompute_attention
        share = recompute + self.backward_ratio * (1 - self.weight_fraction)
        return share * self.forward(stage, num_layers=num_layers)

    def dispatched_again(self, stage: int, *, num_layers: int) -> float:
        """What ``I`` takes on top where an FFN stage is dispatched again: it kept nothing and so runs all again."""
        return (1 - self.recompute_ffn) * self.forward(stage, num_layers=num_layers)

    def weight_gradient(self, stage: int, *, num_layers: int) -> float:
        """Time of ``W``; with ``input_gradient`` it makes the time of ``B``."""
        return self.backward_ratio * self.weight_fraction * self.forward(stage, num_layers=num_layers)

    def edge(self, edge: int) -> float:
        """Time of the transfer between stages ``edge`` and ``edge + 1``, either way."""
        return self.transfer if edge % 2 == 0 or self.combine is None else self.combine
