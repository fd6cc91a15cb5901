"""What ``disagmoe bench`` shows people: a table for each benchmark, from the rows that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Rows = Sequence[dict[str, Any]]


def simulator(rows: Rows) -> Table:
    """Actions per second."""
    table = Table(title="Actions per second, one core")
    for name in ("groups", "layers", "micro-batches", "lanes", "actions", "simulated", "with reading"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["groups"]),
            str(row["layers"]),
            str(row["micro_batches"]),
            "yes" if row["lanes"] else "no",
            f"{row['compute_actions'] + row['transfers']:,}",
            f"{row['actions_per_second']:,.0f}",
            f"{row['actions_per_second_with_reading']:,.0f}",
        )
    return table


def builders(rows: Rows) -> Table:
    """How far above the bounds."""
    table = Table(title="Makespan over the lower bound; live activations over L", box=None, padding=(0, 1, 0, 0))
    table.add_column("part", no_wrap=True)
    for name in ("A+F", "L n", "A F M2N tail", "cap", "live", "bound", "over it", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        table.add_row(
            row["part"],
            f"{row['attention_groups']}+{row['ffn_groups']}",
            f"{row['layers']} {row['micro_batches']}",
            " ".join(f"{row[name]:.2g}" for name in ("attention", "ffn", "transfer", "tail")),
            str(row["max_live"] or "-"),
            f"{row['live'] / row['layers']:.2f}",
            row["bound"],
            f"{row['over_bound']:.4f}",
            f"{row['seconds']:.2f}",
            "" if row["holds"] else f"not {row['bar']:g}",
        )
    return table


def transport(rows: Rows) -> Table:
    """Bytes, rates and overlap of each stream."""
    title = "Both directions busy at once: Gbit/s each way, or the share of the limit"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for name in ("transport", "dispatch", "MxN", "limit"):
        table.add_column(name, no_wrap=True)
    for name in ("MB A-F", "fewer rows", "each way", "loop", "overlap"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        link, fewer = row["link_gbit_per_s"], row["fewer_rows"]
        unit = "gbit_per_s" if link is None else "fraction"
        table.add_row(
            row["transport"],
            row["dispatch"] or "-",
            f"{row['attention_ranks']}x{row['ffn_ranks']}",
            "none" if link is None else f"{link:g}",
            f"{row['forward_bytes'] / 1e6:.1f}",
            "-" if fewer is None else f"{fewer:.2f}",
            " ".join(f"{row[f'{way}_{unit}']:.2f}" for way in ("forward", "reverse")),
            f"{row['compute_slowdown']:+.1%}",
            f"{row['overlap']:.0%}",
        )
    return table


def shaped(rows: Rows) -> Table:
    """Step times beside vanilla's."""
    from megatron_disagmoe.benchmarks.shaped.table import table

    return table(rows)


def schedule(rows: Rows) -> Table:
    """Seconds a step."""
    table = Table(title="Seconds a step; stages sleep, transfers take their time on emulated ports")
    table.add_column("case")
    for name in ("bound", "simulated", "measured", "least", "most", "measured / simulated", "measured / bound"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = ("fill_bound_s", "simulated_s", "measured_s", "measured_min_s", "measured_max_s")
        ratios = ("measured_over_simulated", "measured_over_fill_bound")
        table.add_row(row["case"], *(f"{row[name]:.3f}" for name in (*seconds, *ratios)))
    return table


def executor(rows: Rows) -> Table:
    """What an action costs."""
    table = Table(title="Microseconds of processor time, least of the steps and median")
    for name in ("group", "schedule", "transport", "dispatch"):
        table.add_column(name)
    for name in ("ours, an action", "median", "ours, a compute action", "median", "modules, a compute action"):
        table.add_column(name, justify="right")
    for row in rows:
        columns = ("overhead_us_per_action", "overhead_us_per_compute_action")
        both = [name for column in columns for name in (column, f"median_{column}")]
        names = (row[name] for name in ("group", "schedule", "transport", "dispatch"))
        table.add_row(*names, *(f"{row[name]:.0f}" for name in (*both, "modules_us_per_compute_action")))
    return table


def tracing(rows: Rows) -> Table:
    """Steps with traces beside steps without."""
    table = Table(title="A step with traces against its neighbour without: medians")
    table.add_column("group")
    for name in ("ms without", "ms with", "longer by", "95% from", "to", "processor time"):
        table.add_column(name, justify="right")
    for row in rows:
        shares = [row[f"wall_overhead{end}"] for end in ("", "_low", "_high")] + [row["processor_overhead"]]
        table.add_row(
            row["group"],
            *(f"{row[f'wall_ms_{kind}']:.1f}" for kind in ("plain", "traced")),
            *(f"{100 * share:+.1f}%" for share in shares),
        )
    return table


def planner(rows: Rows) -> Table:
    """Predicted beside measured."""
    table = Table("allocation", "predicted", "measured", "error", "holds", box=None)
    for row in rows:
        if row["kind"] == "choice":
            place = f"measured best: {row['measured_best']}, predicted place {row['measured_best_predicted_place']}"
            table.add_row(f"choice {row['allocation']}", "", place, f"{row['relative_error']:+.1%}", _yes_or_no(row))
            continue
        times = (f"{row['predicted_s']:.3f} s", f"{row['measured_s']:.3f} s")
        table.add_row(row["allocation"], *times, f"{row['relative_error']:+.1%}", _yes_or_no(row))
    return table


def _yes_or_no(row: dict[str, Any]) -> str:
    return "yes" if row["holds"] else "no"
