"""What a system comes to, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Result:
    """A step of one system at its best choice. Seconds and bytes.

    ``exposed``: how much shorter the pipeline would be on a network that takes no time; ``bubble``: what then is left
    beside the busiest GPU's compute. ``choice``: what was chosen, for people.
    """

    system: str
    step_seconds: float
    pipeline_seconds: float
    exposed_seconds: float
    bubble_seconds: float
    peak_bytes: float
    tokens: int
    num_gpus: int
    choice: dict[str, object] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def seconds_per_token_and_gpu(self) -> float:
        """GPU seconds a token; what systems on different numbers of GPUs are compared by."""
        return self.step_seconds * self.num_gpus / self.tokens
