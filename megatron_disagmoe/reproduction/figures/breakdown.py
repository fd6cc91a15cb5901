"""Figures 5 and 6a: shares of time. What is fitted is marked as calibration."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.reproduction.constants import SETTINGS
from megatron_disagmoe.reproduction.figures.base import Figure, Outcome
from megatron_disagmoe.reproduction.hardware import Shares, calibrate, shares
from megatron_disagmoe.reproduction.lab import Lab
from megatron_disagmoe.reproduction.published import FIG5, FIG6A
from megatron_disagmoe.reproduction.rows import Row
from megatron_disagmoe.reproduction.systems.layer import Job

_PARTS = (("attention", "#0072b2"), ("FFN", "#e69f00"), ("all-to-alls", "#999999"))


def fig5(lab: Lab) -> Outcome:
    """Share of all-to-alls with EP over 1 to 8 nodes; only 8 nodes are fitted."""
    constants, found = lab.constants, calibrate(lab.constants)
    cluster, setting = found.cluster(), SETTINGS["fig5"]
    per_node = cluster.pools[0].gpus_per_node
    model = load_model(setting.model)
    ours: dict[int, Shares] = {}
    for nodes in (1, 2, 4, 8):
        own = found.eight_nodes ** ((nodes - 1) / 7)  # between 1 node, where it isn't needed, and 8
        job = Job(
            model,
            cluster,
            setting.sequences[0],
            constants.micro_batch_size,
            nodes * per_node,
            nccl=own / constants.af_over_nccl,
        )
        ours[nodes] = shares(job)
    rows = tuple(
        Row(
            "fig5",
            f"share of all-to-alls, EP over {nodes} node{'s' if nodes > 1 else ''}",
            FIG5[nodes],
            ours[nodes].communication,
            calibration=nodes == max(FIG5),
            note="" if nodes == max(FIG5) else "not fitted: NVLink as the cluster file has it",
        )
        for nodes in FIG5
    )

    def draw(picture: Picture) -> None:
        axis = picture.subplots()
        _stack(axis, [f"{nodes}" for nodes in ours], list(ours.values()))
        axis.plot([str(nodes) for nodes in FIG5], [1 - share for share in FIG5.values()], "k_", ms=30, label="paper")
        axis.set_xlabel("nodes of an expert-parallel group")
        axis.legend(fontsize=8)

    return Outcome(rows, {str(nodes): vars(each) for nodes, each in ours.items()}, draw)


def fig6a(lab: Lab) -> Outcome:
    """Shares of a layer by sequence length, after the fit."""
    constants, setting = lab.constants, SETTINGS["fig6a"]
    cluster, model = calibrate(constants).cluster(), load_model(setting.model)
    ours = {
        sequence: shares(
            Job(
                model,
                cluster,
                sequence,
                constants.micro_batch_size,
                constants.expert_parallel,
                nccl=1 / constants.af_over_nccl,
            )
        )
        for sequence in (4096, 8192, 16384, 32768)
    }
    rows = []
    for sequence, (attention, ffn) in FIG6A.items():
        mine, length = ours[sequence], f"{sequence // 1024}K"
        rest = 1 - attention - ffn
        for name, paper, value in (
            ("share of attention", attention, mine.attention),
            ("share of FFN", ffn, mine.ffn),
            ("share of communication", rest, mine.communication),
            ("attention over half of communication", 2 * attention / rest, 2 * mine.attention / mine.communication),
            ("FFN over half of communication", 2 * ffn / rest, 2 * mine.ffn / mine.communication),
        ):
            rows.append(Row("fig6a", f"{length}: {name}", paper, value, calibration=True))

    def draw(picture: Picture) -> None:
        axis = picture.subplots()
        labels = [f"{sequence // 1024}K" for sequence in ours]
        _stack(axis, labels, list(ours.values()))
        for sequence, (attention, ffn) in FIG6A.items():
            at = labels.index(f"{sequence // 1024}K")
            axis.plot([at, at], [attention, attention + ffn], "k_", ms=30, label="paper" if at == 0 else None)
        axis.set_xlabel("tokens of a sequence")
        axis.legend(fontsize=8)

    return Outcome(tuple(rows), {str(sequence): vars(each) for sequence, each in ours.items()}, draw)


def _stack(axis: Axes, labels: list[str], values: list[Shares]) -> None:
    bottom = [0.0] * len(values)
    columns = ([v.attention for v in values], [v.ffn for v in values], [v.communication for v in values])
    for (name, colour), heights in zip(_PARTS, columns, strict=True):
        axis.bar(labels, heights, 0.6, bottom=bottom, label=name, color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.set_ylabel("share of a layer's time")
    axis.set_ylim(0, 1)


FIGURES = (
    Figure("fig5", "All-to-alls grow with the nodes of an expert-parallel group", list, fig5),
    Figure("fig6a", "Where a layer's time goes, by sequence length", list, fig6a),
)
