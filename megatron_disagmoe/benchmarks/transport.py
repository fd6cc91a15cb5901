"""``disagmoe bench transport``: bytes, bandwidth each way and overlap, per dispatch mode and back end.

M attention ranks are on one host, N FFN ranks on another (one node, for ``per-node``); both directions are busy at
once, with messages as large as a mode makes them for one routing. Beside them gloo's own point-to-point and
all-to-all with plain messages. Without a limit on the link the ranks share this machine's network and memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_disagmoe.benchmarks.hosts import Hosts, HostsUnavailable, why_unavailable
from megatron_disagmoe.benchmarks.ranks import Place, ThisMachine, run_ranks

#: M x N.
SIZES = ((1, 1), (2, 2), (3, 1), (1, 3))
LINKS = (None, 1.0)
_WORKER = "megatron_disagmoe.benchmarks.transport_worker"


@dataclass(frozen=True)
class Settings:
    """What is measured. With these sizes a per-rank message to one FFN rank has 4 MiB of hidden states.

    Attributes:
        tokens: of an attention rank's micro-batch, ``T``.
        hidden_size: ``h``, in fp32.
        experts: ``E``, chosen uniformly.
        topk: ``k``.
        raw_bytes: size of gloo's own messages.
        repeats: timings of each stream; the median counts.
        overlap_repeats: of the compute loop, alone and beside transfers.
        seconds: length of a timing.
    """

    tokens: int = 2048
    hidden_size: int = 512
    experts: int = 12
    topk: int = 4
    raw_bytes: int = 4 << 20
    repeats: int = 3
    overlap_repeats: int = 5
    seconds: float = 1.5


def measure(
    folder: Path,
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    links: Sequence[float | None] = LINKS,
    settings: Settings | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """One row per back end, dispatch mode, M x N and link (Gbit/s, None for no limit); logs go to ``folder``.

    Raises:
        HostsUnavailable: before anything is measured, where a link is to be limited and cannot be here.
        ValueError: for sizes that do not fit.
        RuntimeError: where a rank fails.
    """
    settings = settings or Settings()
    if any(link is not None for link in links) and (reason := why_unavailable()) is not None:
        raise HostsUnavailable(f"{reason}; or measure without a limit only: --links none")
    for m, n in sizes:
        if m < 1 or n < 1 or settings.experts % n:
            raise ValueError(f"{m}x{n} ranks: both at least 1, and FFN ranks among the divisors of {settings.experts}")
    rows = []
    for link in links:
        for m, n in sizes:
            progress(f"{m}x{n} ranks, {'no limit' if link is None else f'{link:g} Gbit/s'}")
            rows += _world(m, n, link, settings, folder / f"{m}x{n}-{'unlimited' if link is None else f'{link:g}'}")
    return [_with_expected(row, settings) for row in rows]


def _world(m: int, n: int, link: float | None, settings: Settings, folder: Path) -> list[dict[str, Any]]:
    out = folder / "rows.json"
    given = {**asdict(settings), "attention_ranks": m, "ffn_ranks": n, "link_gbit_per_s": link, "out": str(out)}

    def run(attention: Place, ffn: Place) -> None:
        run_ranks([attention] * m + [ffn] * n, _WORKER, given, folder, timeout_seconds=300)

    if link is None:
        run(ThisMachine(), ThisMachine())
    else:
        with Hosts(2, gbit_per_s=link) as hosts:
            run(hosts[0], hosts[1])
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def _with_expected(row: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """``fewer_rows``: times fewer hidden-state rows than per-expert moves, measured and expected."""
    mode, n = row["dispatch"], row["ffn_ranks"]
    if mode is None:
        return {**row, "fewer_rows": None, "fewer_rows_expected": None}
    pieces = {"per-expert": settings.experts, "per-rank": n, "per-node": 1}[mode]
    per_expert = settings.topk * settings.tokens * row["attention_ranks"]
    expected = settings.topk / expected_distinct(settings.experts, settings.topk, pieces)
    return {**row, "fewer_rows": per_expert / row["hidden_rows"], "fewer_rows_expected": expected}


def expected_distinct(experts: int, topk: int, pieces: int) -> float:
    """Of ``pieces`` equal parts of the experts, how many a token goes to that chooses ``topk`` uniformly.

    A part is missed with probability C(E - E/pieces, k) / C(E, k).
    """
    return pieces * (1 - math.comb(experts - experts // pieces, topk) / math.comb(experts, topk))


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """``"1x1,2x2"`` as pairs of M and N.

    Raises:
        ValueError: where it is not such a list.
    """
    try:
        pairs = [tuple(int(part) for part in pair.split("x")) for pair in text.split(",")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"--sizes {text!r}: write it like 1x1,2x2")
    return [(pair[0], pair[1]) for pair in pairs]


def parse_links(text: str) -> list[float | None]:
    """``"none,1"`` as limits in Gbit/s.

    Raises:
        ValueError: where it is not such a list.
    """
    try:
        return [None if part == "none" else float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--links {text!r}: write it like none,1 (Gbit/s)") from None
