"""The rows as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a row; ``speed-up`` is vanilla's all-to-all step over this one."""
    made = Table(title="Steps in turn (A B A B ...) in one run; medians in ms, (minimum to maximum)")
    for name in ("hosts", "Gbit/s", "system", "dispatch", "transport", "schedule"):
        made.add_column(name)
    for name in ("step", "spread", "speed-up", "over one copy", "vanilla exposed", "simulated", "MB sent", "loss"):
        made.add_column(name, justify="right")
    for row in rows:
        link, exposed = row["link_gbit_per_s"], row["vanilla_exposed_fraction"]
        made.add_row(
            str(row["hosts"]),
            "none" if link is None else f"{link:g}",
            row["system"],
            row["dispatch"],
            row["transport"] or "",
            row["schedule"] or "",
            f"{row['step_ms']:.0f}",
            f"({row['step_ms_min']:.0f} to {row['step_ms_max']:.0f})",
            f"{row['vanilla_ms'] / row['step_ms']:.2f}",
            f"{row['one_copy_ms'] / row['step_ms']:.2f}",
            "-" if exposed is None else f"{exposed:.0%}",
            f"{row['simulated_over_measured']:.2f}" if "simulated_over_measured" in row else "",
            " ".join(f"{sent / 1e6:.1f}" for sent in row["bytes_sent_by_host"]),
            f"{row['max_relative_loss_difference']:.0e}",
        )
    return made
