"""Figures 10 and 11: end to end against every baseline, and exposed communication."""

from __future__ import annotations

import itertools

from matplotlib.figure import Figure as Picture

from megatron_disagmoe.reproduction.constants import SETTINGS
from megatron_disagmoe.reproduction.figures.base import COLOURS, LABELS, Figure, Outcome, gain, summary
from megatron_disagmoe.reproduction.lab import Cell, Lab
from megatron_disagmoe.reproduction.published import FIG10, FIG11, MODELS, SEQUENCES
from megatron_disagmoe.reproduction.rows import Row
from megatron_disagmoe.reproduction.systems.result import Result

#: The paper's systems from the slowest to the fastest.
PAPER_SYSTEMS = ("megatron-1f1b", "tutel", "comet", "dualpipe", "af-pipe")
#: Shown beside them: not in the paper.
MORE = ("megatron-overlap", "dualpipe-per-node")
_GROUPS = {
    "Megatron-1F1B": ("megatron-1f1b",),
    "Tutel and Comet": ("tutel", "comet"),
    "DualPipe": ("dualpipe",),
}


def cell(system: str, model: str, sequence: int) -> Cell:
    """A system on one of the paper's models, with its top-k."""
    return Cell(system, model, sequence, top_k=dict(MODELS)[model])


def fig10_cells() -> list[Cell]:
    """Every system, model and length."""
    systems = (*PAPER_SYSTEMS, *MORE)
    return [cell(system, model, length) for model, _ in MODELS for length in SEQUENCES for system in systems]


def fig10(lab: Lab) -> Outcome:
    """AF-pipe's gain over each baseline, least and greatest, and the order of systems."""
    results = {each: lab[each] for each in fig10_cells()}
    rows: list[Row] = []
    for group, systems in _GROUPS.items():
        gains: dict[str, float] = {}
        missing = []
        for model, _ in MODELS:
            for length in SEQUENCES:
                ours = results[cell("af-pipe", model, length)]
                for system in systems:
                    where = f"{model} at {length // 1024}K against {LABELS[system]}"
                    value = gain(results[cell(system, model, length)], ours)
                    if value:
                        gains[where] = value
                    else:
                        missing.append(where)
        for name, number, pick in (("least", 0, min), ("greatest", 1, max)):
            where = pick(gains, key=lambda each: gains[each]) if gains else "nowhere"
            absent = f"; {len(missing)} of {len(missing) + len(gains)} fit nowhere" if missing else ""
            note = f"ours: {where}{absent}"
            value = gains.get(where, 0.0)
            rows.append(Row("fig10", f"{name} gain over {group}", FIG10[group][number], value, note=note))
    rows += [_order(results, model) for model, _ in MODELS]
    data = {f"{each.system} {each.model} {each.sequence}": summary(result) for each, result in results.items()}
    return Outcome(tuple(rows), data, lambda picture: _draw10(picture, results))


def _order(results: dict[Cell, Result | None], model: str) -> Row:
    """Megatron slowest, then Tutel and Comet, then DualPipe, AF-pipe fastest, at every length."""
    wrong = []
    for length in SEQUENCES:
        seconds = {s: results[cell(s, model, length)] for s in PAPER_SYSTEMS}
        times = {s: r.seconds_per_token_and_gpu if r else float("inf") for s, r in seconds.items()}
        middle = (times["tutel"], times["comet"])
        right = times["megatron-1f1b"] > max(middle) and min(middle) > times["dualpipe"] > times["af-pipe"]
        if not right:
            ranking = " > ".join(LABELS[s] for s in sorted(times, key=lambda s: -times[s]))
            wrong.append(f"{length // 1024}K: {ranking}")
    share = 1 - len(wrong) / len(SEQUENCES)
    return Row("fig10", f"{model}: share of lengths with the paper's order", 1.0, share, 0.0, note="; ".join(wrong))


def _draw10(picture: Picture, results: dict[Cell, Result | None]) -> None:
    picture.set_size_inches(12, 3.6)
    axes = picture.subplots(1, len(MODELS), sharey=True)
    systems = (*PAPER_SYSTEMS, *MORE)
    for axis, (model, _) in zip(axes, MODELS, strict=True):
        for number, system in enumerate(systems):
            heights = [
                gain(results[cell("megatron-1f1b", model, length)], results[cell(system, model, length)])
                for length in SEQUENCES
            ]
            places = [at + (number - 3) * 0.12 for at in range(len(SEQUENCES))]
            axis.bar(places, heights, 0.115, color=COLOURS[system], label=LABELS[system])
        axis.axhspan(*FIG10["Megatron-1F1B"], color="#d55e00", alpha=0.15, label="paper's AF-pipe")
        axis.set_xticks(range(len(SEQUENCES)), [f"{length // 1024}K" for length in SEQUENCES])
        axis.set_title(model, fontsize=9)
    axes[0].set_ylabel("throughput over Megatron-1F1B")
    axes[-1].legend(fontsize=6, loc="upper right")


def fig11_cells() -> list[Cell]:
    """Every system on DeepSeek-MoE at 8K."""
    setting = SETTINGS["fig11"]
    return [cell(system, setting.model, setting.sequences[0]) for system in (*PAPER_SYSTEMS, *MORE)]


def fig11(lab: Lab) -> Outcome:
    """How much less communication AF-pipe exposes."""
    results = {each.system: lab[each] for each in fig11_cells()}
    tokens = next(result.tokens for result in results.values() if result is not None)
    exposed = {  # for as many tokens
        system: result.exposed_seconds * tokens / result.tokens
        for system, result in results.items()
        if result is not None
    }
    ours = exposed["af-pipe"]
    rows = []
    for name, paper in FIG11.items():
        other = exposed.get(name.lower())
        value = 1 - ours / other if other else 0.0
        rows.append(
            Row("fig11", f"reduction of exposed communication against {name}", paper, value,
                note=f"exposed a step: {ours:.3f} s against {other:.3f} s" if other else "fits nowhere")
        )  # fmt: skip
    order = [exposed.get(system, 0.0) for system in ("tutel", "comet", "dualpipe", "af-pipe")]
    right = all(before > after for before, after in itertools.pairwise(order))
    rows.append(
        Row("fig11", "order: Tutel exposes most, then Comet, DualPipe, AF-pipe", 1.0, float(right), 0.0,
            note=", ".join(f"{seconds:.3f} s" for seconds in order))
    )  # fmt: skip

    def draw(picture: Picture) -> None:
        axis = picture.subplots()
        names = list(exposed)
        axis.bar([LABELS[n] for n in names], list(exposed.values()), color=[COLOURS[n] for n in names])
        axis.set_ylabel("exposed communication, seconds a step")
        axis.tick_params(axis="x", labelrotation=25, labelsize=7)

    return Outcome(tuple(rows), {name: summary(result) for name, result in results.items()}, draw)


FIGURES = (
    Figure("fig10", "End to end on 128 GPUs", fig10_cells, fig10),
    Figure("fig11", "Exposed communication, DeepSeek-MoE at 8K", fig11_cells, fig11),
)
