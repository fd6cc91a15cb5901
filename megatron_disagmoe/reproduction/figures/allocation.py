"""Figures 12, 13 and 14: A:F ratios, experts per token, virtual stages."""

from __future__ import annotations

import itertools

from matplotlib.figure import Figure as Picture

from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.reproduction.constants import SETTINGS
from megatron_disagmoe.reproduction.figures.base import COLOURS, Figure, Outcome, gain, summary
from megatron_disagmoe.reproduction.lab import Cell, Lab
from megatron_disagmoe.reproduction.published import (
    FIG12_16K,
    FIG12_BEST,
    FIG12_OVER_EVEN,
    FIG13,
    FIG13_TOP_K,
    FIG13_WIDEST,
    FIG14_BEST,
    FIG14_V,
)
from megatron_disagmoe.reproduction.rows import Row
from megatron_disagmoe.reproduction.systems.af_paper import Shape
from megatron_disagmoe.reproduction.systems.result import Result

_WORLD, _NICS = 128, 16
_RATIOS = tuple(FIG12_16K)


def _fig12_shapes(ratio: tuple[int, int]) -> tuple[Shape, ...]:
    """Groups of the ratio's GPUs with 16 NICs a side: every depth, and attention cut or not."""
    attention, ffn = ratio
    found = []
    for cut in (1, 2, 4, 8):
        for groups in (1, 2, 4):
            replicas = max(1, _WORLD // (2 * _NICS * groups))
            found.append(Shape(groups, attention // cut, ffn, replicas, 1, cut, nics=_NICS))
    return tuple(found)


def _fig12_cell(ratio: tuple[int, int], sequence: int) -> Cell:
    setting = SETTINGS["fig12"]
    bytes_per = setting.bytes_per_parameter or 0
    shapes = _fig12_shapes(ratio)
    return Cell("af-pipe", setting.model, sequence, bytes_per_parameter=bytes_per, shapes=shapes, keep=3)


def _fig12_baseline(sequence: int) -> Cell:
    setting = SETTINGS["fig12"]
    bytes_per = setting.bytes_per_parameter or 0
    return Cell("megatron-1f1b", setting.model, sequence, bytes_per_parameter=bytes_per)


def fig12_cells() -> list[Cell]:
    """Every ratio and the baseline, at both lengths."""
    lengths = SETTINGS["fig12"].sequences
    return [_fig12_cell(ratio, s) for s in lengths for ratio in _RATIOS] + [_fig12_baseline(s) for s in lengths]


def _used(result: Result) -> int:
    gpus = result.choice["gpus"]
    assert isinstance(gpus, int), "set by af_search"
    return gpus


def fig12(lab: Lab) -> Outcome:
    """Throughput per GPU by A:F; GPUs that a ratio leaves idle aren't counted."""
    gains: dict[int, dict[tuple[int, int], float]] = {}
    data = {}
    for sequence in SETTINGS["fig12"].sequences:
        base = lab[_fig12_baseline(sequence)]
        data[f"megatron-1f1b {sequence}"] = summary(base)
        gains[sequence] = {}
        for ratio in _RATIOS:
            result = lab[_fig12_cell(ratio, sequence)]
            data[f"{ratio[0]}:{ratio[1]} {sequence}"] = summary(result)
            value = 0.0
            if base is not None and result is not None:
                value = base.seconds_per_token_and_gpu / (result.step_seconds * _used(result) / result.tokens)
            gains[sequence][ratio] = value
    rows = []
    for sequence, published in FIG12_BEST.items():
        mine = gains[sequence]
        first = max(mine, key=lambda ratio: mine[ratio])
        best = published if mine[published] >= mine[first] * (1 - lab.constants.tie) else first
        shown = ", ".join(f"{a}:{f} {value:.2f}x" for (a, f), value in mine.items())
        quantity = f"{sequence // 1024}K: best A:F"
        rows.append(Row("fig12", quantity, published[1] / published[0], best[1] / best[0], 0.0, note=f"F/A; {shown}"))
    for ratio, paper in FIG12_16K.items():
        name = f"16K: A:F = {ratio[0]}:{ratio[1]} over Megatron-1F1B"
        rows.append(Row("fig12", name, paper, gains[16384][ratio]))
    even = gains[16384][16, 16]
    over = gains[16384][16, 10] / even if even else 0.0
    rows.append(Row("fig12", "16K: 16:10 over 16:16", FIG12_OVER_EVEN, over))

    def draw(picture: Picture) -> None:
        axis = picture.subplots()
        for number, (sequence, mine) in enumerate(gains.items()):
            places = [at + 0.4 * number for at in range(len(mine))]
            axis.bar(places, list(mine.values()), 0.38, label=f"{sequence // 1024}K")
        axis.plot([at + 0.4 for at in range(len(_RATIOS))], list(FIG12_16K.values()), "k_", ms=25, label="paper, 16K")
        axis.set_xticks([at + 0.2 for at in range(len(_RATIOS))], [f"{a}:{f}" for a, f in _RATIOS])
        axis.set_xlabel("GPUs of a group, A:F, at NICs 16:16")
        axis.set_ylabel("throughput per GPU over Megatron-1F1B")
        axis.legend(fontsize=8)

    return Outcome(tuple(rows), data, draw)


def _fig13_cell(system: str, top_k: int) -> Cell:
    setting = SETTINGS["fig13"]
    return Cell(system, setting.model, setting.sequences[0], top_k=top_k)


def fig13_cells() -> list[Cell]:
    """Both systems at every top-k."""
    return [_fig13_cell(system, k) for k in FIG13_TOP_K for system in ("megatron-1f1b", "af-pipe")]


def fig13(lab: Lab) -> Outcome:
    """Gain over Megatron-1F1B by experts per token."""
    gains, data = {}, {}
    for k in FIG13_TOP_K:
        base, ours = lab[_fig13_cell("megatron-1f1b", k)], lab[_fig13_cell("af-pipe", k)]
        data[f"top-{k}"] = {"megatron-1f1b": summary(base), "af-pipe": summary(ours)}
        gains[k] = gain(base, ours)
    shown = ", ".join(f"top-{k} {value:.2f}x" for k, value in gains.items())
    widest = max(gains, key=lambda k: gains[k])
    rows = (
        Row("fig13", "least gain over Megatron-1F1B", FIG13[0], min(gains.values()), note=shown),
        Row("fig13", "greatest gain over Megatron-1F1B", FIG13[1], max(gains.values()), note=shown),
        Row("fig13", "place of the greatest gain: top-k", FIG13_WIDEST, widest, 0.0, note=shown),
    )

    def draw(picture: Picture) -> None:
        axis = picture.subplots()
        axis.plot([str(k) for k in gains], list(gains.values()), "o-", color=COLOURS["af-pipe"], label="ours")
        axis.axhspan(*FIG13, color="#999999", alpha=0.25, label="paper")
        axis.set_xlabel("experts per token, of 64")
        axis.set_ylabel("throughput over Megatron-1F1B")
        axis.set_ylim(0, 2.2)
        axis.legend(fontsize=8)

    return Outcome(rows, data, draw)


def _fig14_cell(groups: int) -> Cell:
    """All GPUs in p groups a side of equal size: the fewer groups, the more layers each and the more GPUs."""
    setting = SETTINGS["fig14"]
    each = _WORLD // (2 * groups)
    shape = Shape(groups, each, each, 1)
    return Cell("af-pipe", setting.model, setting.sequences[0], shapes=(shape,))


def _fig14_groups() -> dict[int, int]:
    """p by v: 32, 16, ..., 1 groups stand for v = 1, 2, ..., 32."""
    return {v: max(FIG14_V) // v for v in FIG14_V}


def fig14_cells() -> list[Cell]:
    """Every depth."""
    return [_fig14_cell(groups) for groups in _fig14_groups().values()]


def fig14(lab: Lab) -> Outcome:
    """Throughput by virtual stages."""
    layers = load_model(SETTINGS["fig14"].model).num_moe_layers
    results = {v: lab[_fig14_cell(groups)] for v, groups in _fig14_groups().items()}
    rate = {v: result.tokens_per_second if result else 0.0 for v, result in results.items()}
    shown = ", ".join(
        f"v = {-(-layers // (max(FIG14_V) // v))}: {value / 1e6:.3f}M tokens/s" if value else f"{v}: fits nowhere"
        for v, value in rate.items()
    )
    best = max(rate, key=lambda v: rate[v])
    if rate[FIG14_BEST] >= rate[best] * (1 - lab.constants.tie):
        best = FIG14_BEST
    rising = [v for v in FIG14_V if v <= FIG14_BEST]
    rises = all(rate[before] < rate[after] for before, after in itertools.pairwise(rising))
    full = [v for v in FIG14_V if not rate[v]]
    rows = (
        Row("fig14", "v of the greatest throughput", FIG14_BEST, best, 0.0, note=shown),
        Row("fig14", "throughput rises with v up to 16", 1.0, float(rises), 0.0, note=shown),
        Row("fig14", "v at which memory runs out", 2 * FIG14_BEST, min(full, default=0), 0.0, note=shown),
    )

    def draw(picture: Picture) -> None:
        axis = picture.subplots()
        there = [v for v in FIG14_V if rate[v]]
        axis.plot([str(v) for v in there], [rate[v] / 1e6 for v in there], "o-", color=COLOURS["af-pipe"])
        for v in full:
            axis.text(FIG14_V.index(v), 0, "out of memory", rotation=90, ha="center", va="bottom")
        axis.set_xlabel("virtual stages (about)")
        axis.set_ylabel("million tokens a second")
        axis.set_ylim(bottom=0)

    return Outcome(rows, {str(v): summary(result) for v, result in results.items()}, draw)


FIGURES = (
    Figure("fig12", "A:F at NICs 16:16, Qwen3", fig12_cells, fig12),
    Figure("fig13", "Experts per token, of 64, at 8K", fig13_cells, fig13),
    Figure("fig14", "Virtual stages", fig14_cells, fig14),
)
