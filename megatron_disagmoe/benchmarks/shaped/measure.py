"""The sweep: at every link's limit every variant takes steps in turn, and each becomes a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_disagmoe.benchmarks.hosts import Hosts, HostsUnavailable, why_unavailable
from megatron_disagmoe.benchmarks.shaped.cases import ONE_COPY, RIVALS, VANILLA, Model, Variant
from megatron_disagmoe.benchmarks.shaped.fleet import Fleet, StepTaken
from megatron_disagmoe.benchmarks.shaped.predict import Predictor
from megatron_disagmoe.benchmarks.shaped.raw_link import LinkSpeed, link_speed

#: The first steps of a run make connections and buffers.
WARM_UP_STEPS = 2
#: fp32 sums in another order differ by about this much, relative, after some hundred steps.
LOSS_TOLERANCE = 1e-5

Link = float | None
"""Gbit/s in each direction; None: unlimited."""


@dataclass(frozen=True)
class Measured:
    """The steps of one variant at one link, and the numbers they have in its run, from 0."""

    steps: list[StepTaken]
    numbers: list[int]

    @property
    def seconds(self) -> list[float]:
        """Of every step."""
        return [step.seconds for step in self.steps]

    @property
    def median_ms(self) -> float:
        """Of a step."""
        return 1e3 * median(self.seconds)

    @property
    def bytes_sent_by_host(self) -> list[int]:
        """Median over the steps, by the interfaces' counters."""
        return [int(median(sent)) for sent in zip(*(step.bytes_sent for step in self.steps), strict=True)]


def measure(
    model: Model,
    variants: Sequence[Variant],
    *,
    hosts: int,
    links: Sequence[Link],
    repeats: int,
    folder: Path,
    timeout_seconds: float = 300.0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Rows of every variant at every link; the rivals in ``cases.RIVALS`` always take part.

    Args:
        hosts: an even number; half of them hold attention in AF-pipe.
        repeats: steps of each variant at each link, taken in turn.
        folder: for logs and traces.

    Raises:
        HostsUnavailable: without root or network namespaces.
        ValueError: for sizes that do not fit.
        RuntimeError: where a rank fails.
    """
    if hosts < 2 or hosts % 2:
        raise ValueError(f"--hosts {hosts}: an even number, half of them for each side")
    if model.experts % hosts or model.micro_batches % hosts:
        raise ValueError(
            f"--hosts {hosts} does not divide the {model.experts} experts and {model.micro_batches} micro-batches of "
            f"model {model.name}"
        )
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: at least 1; 5 or more for figures to quote")
    reason = why_unavailable()
    if reason is not None:
        raise HostsUnavailable(reason)
    everyone = [*RIVALS, *variants]
    taken: dict[tuple[Link, Variant], Measured] = {}
    speeds: dict[Link, LinkSpeed] = {}
    counts = dict.fromkeys(everyone, 0)
    with Hosts(hosts) as network, Fleet(network, model, everyone, folder, timeout_seconds=timeout_seconds) as fleet:
        for _ in range(WARM_UP_STEPS):
            for variant in everyone:
                progress(f"warming up {variant.name}")
                fleet.step(variant)
                counts[variant] += 1
        for link in links:
            network.limit(link)
            speeds[link] = LinkSpeed(1.0, 0.0) if link is None else link_speed(network)
            found: dict[Variant, Measured] = {variant: Measured([], []) for variant in everyone}
            for turn in range(repeats):
                for variant in everyone:
                    found[variant].steps.append(fleet.step(variant))
                    found[variant].numbers.append(counts[variant])
                    counts[variant] += 1
                progress(f"{link_name(link)}: turn {turn + 1} of {repeats}")
            taken.update({(link, variant): measured for variant, measured in found.items()})
    predictors = {
        variant: Predictor(fleet.traces(variant), variant, model, hosts) for variant in variants if variant.is_af_pipe
    }
    return _rows(model, hosts, speeds, everyone, taken, predictors)


def link_name(link: Link) -> str:
    """For people."""
    return "unlimited" if link is None else f"{link:g} Gbit/s"


def _rows(
    model: Model,
    hosts: int,
    speeds: dict[Link, LinkSpeed],
    everyone: Sequence[Variant],
    taken: dict[tuple[Link, Variant], Measured],
    predictors: dict[Variant, Predictor],
) -> list[dict[str, Any]]:
    rows = []
    for link, speed in speeds.items():
        vanilla, rival = taken[link, VANILLA], taken[link, ONE_COPY]
        unlimited = taken.get((None, VANILLA))
        exposed = None if unlimited is None else 1 - unlimited.median_ms / vanilla.median_ms
        for variant in everyone:
            mine = taken[link, variant]
            row: dict[str, Any] = {
                "model": model.name,
                "hosts": hosts,
                "link_gbit_per_s": link,
                "link_share": speed.share,
                "link_round_trip_ms": 1e3 * speed.round_trip,
                "system": variant.system,
                "transport": variant.transport,
                "dispatch": variant.dispatch,
                "schedule": variant.schedule,
                "step_ms": mine.median_ms,
                "step_ms_min": 1e3 * min(mine.seconds),
                "step_ms_max": 1e3 * max(mine.seconds),
                "steps": len(mine.steps),
                "cpu_ms": 1e3 * median(step.cpu_seconds for step in mine.steps),
                "bytes_sent_by_host": mine.bytes_sent_by_host,
                "vanilla_ms": vanilla.median_ms,
                "one_copy_ms": rival.median_ms,
                "vanilla_exposed_fraction": exposed,
                "max_relative_loss_difference": _loss_difference(vanilla, mine),
            }
            row["losses_equal"] = row["max_relative_loss_difference"] <= LOSS_TOLERANCE
            if variant.is_af_pipe:
                row["af_pipe_ms"] = mine.median_ms
                row["speedup"] = vanilla.median_ms / mine.median_ms
                row["speedup_over_one_copy"] = rival.median_ms / mine.median_ms
                row["paired_speedup"] = median(a / b for a, b in zip(vanilla.seconds, mine.seconds, strict=True))
                free = taken[None, variant].numbers if (None, variant) in taken else ()
                simulated = predictors[variant].step_ms(link, mine.numbers, mine.steps, unlimited=free, speed=speed)
                row["simulated_ms"] = simulated
                row["simulated_over_measured"] = simulated / mine.median_ms
            rows.append(row)
    return rows


def _loss_difference(vanilla: Measured, mine: Measured) -> float:
    return max(abs(b.loss - a.loss) / abs(a.loss) for a, b in zip(vanilla.steps, mine.steps, strict=True))
