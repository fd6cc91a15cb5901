"""Everything that the paper leaves open, fixed before the first comparison; nothing here is fitted to figures 10 to 14.

Each constant has a value, a plausible range (the sensitivity table goes through it), a reason and a source. What the
hardware does (peaks, efficiencies, bandwidths, latencies) stands in ``configs/`` with its own sources; two factors on
top of it are fitted to figure 6a (``hardware``) and then frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self


@dataclass(frozen=True)
class Origin:
    """Where a constant comes from. ``low``, ``high``: its plausible range."""

    low: float
    high: float
    reason: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Constants:
    """See ``ORIGINS`` for the reason of each."""

    expert_parallel: int = 16
    sequences_per_gpu: int = 4
    micro_batch_size: int = 1
    bytes_per_parameter: int = 18
    communication_sms: float = 20 / 132
    comet_hidden: float = 0.865
    tutel_most_chunks: int = 8
    af_over_nccl: float = 1.1
    af_communication_sms: float = 0.0
    free_cuts: int = 0
    tie: float = 0.01

    def with_(self, name: str, value: float) -> Self:
        """The same with one constant replaced, whole numbers kept whole.

        Raises:
            ValueError: there is no such constant.
        """
        if name not in ORIGINS:
            raise ValueError(f"there is no constant {name!r}; choose among {', '.join(ORIGINS)}")
        whole = isinstance(getattr(self, name), int)
        changes: dict[str, float] = {name: int(value) if whole else value}
        return replace(self, **changes)  # type: ignore[arg-type]  # one of the fields, checked above


ORIGINS: dict[str, Origin] = {
    "expert_parallel": Origin(
        8,
        32,
        "Baselines run EP = 16 over two nodes of 8 GPUs. Attention is data-parallel over the same 16 GPUs.",
        "the paper, set-up",
    ),
    "sequences_per_gpu": Origin(
        2,
        16,
        "'Local batch fixed' is read as: as many sequences a GPU and step at every length and for every system. 4 "
        "make 2M tokens a step on 128 GPUs at 4K; the number itself isn't given. It sets how much of a step is "
        "bubble.",
        "the paper says only that it is fixed; the figure is ours",
    ),
    "micro_batch_size": Origin(
        1, 2, "One sequence a GPU, the least there is: long sequences fill a GPU, and memory binds.", "not given; usual"
    ),
    "bytes_per_parameter": Origin(
        14,
        18,
        "bf16 weights, fp32 gradients, fp32 master weights and Adam moments: what Megatron does unless told "
        "otherwise. The distributed optimizer shares masters and moments out over the copies of a parameter.",
        "Megatron-LM's defaults; the paper gives neither precision nor ZeRO stage",
    ),
    "communication_sms": Origin(
        0.12,
        0.25,
        "Share of SMs that all-to-all kernels take from compute that runs beside them (20 of 132); compute beside "
        "them is slower by 1 / (1 - share).",
        "DeepSeek-V3, arXiv 2412.19437, section 3.2.2: 20 of 132 SMs; DeepEP README: 24",
    ),
    "comet_hidden": Origin(
        0.7,
        0.95,
        "Share of what could be hidden (the shorter of FFN and its two all-to-alls) that Comet does hide.",
        "Comet, arXiv 2502.19811, evaluation: 86.5% of communication hidden where compute suffices",
    ),
    "tutel_most_chunks": Origin(
        2,
        8,
        "Tutel cuts the tokens of an MoE layer into 1, 2, 4 or 8 chunks, whichever is fastest (its adaptive "
        "pipelining).",
        "Tutel, arXiv 2206.03382, section 3.3",
    ),
    "af_over_nccl": Origin(
        1.0,
        1.25,
        "Bandwidth of AF-pipe's one-sided RDMA over that of NCCL's all-to-all on the same NICs. 43 of 50 GB/s is what "
        "RDMA reaches at these sizes (the cluster file's efficiency); NCCL's grouped sends stay some 10% below at "
        "messages of 10 to 20 MB a peer.",
        "DeepEP README for 43 GB/s; NCCL's share is an estimate (a library of this kind claims far more at small "
        "messages, MegaScale-Infer, arXiv 2504.02263)",
    ),
    "af_communication_sms": Origin(
        0.0,
        0.1,
        "One-sided RDMA takes no SMs; packing and unpacking are charged as memory traffic of their own.",
        "the paper: GPUDirect RDMA and GDRCopy",
    ),
    "free_cuts": Origin(
        0,
        1,
        "The paper tunes PP and v of its baselines and names no tensor or context parallelism. So a sequence is shared "
        "by 2, 4 or 8 GPUs only where nothing fits otherwise (0), for every system alike. 1 lets all choose freely.",
        "the paper, set-up, for PP and v; with whole sequences on a GPU nothing fits at 32K, and the paper ran it",
    ),
    "tie": Origin(
        0.01,
        0.01,
        "Allocations within this share of the best count as best where the place of an optimum is compared: figures "
        "are read to about 1%.",
        "ours",
    ),
}

#: Rows hold within these: ratios and reductions relatively; orders and places of an optimum exactly (ties apart).
RATIO_TOLERANCE = 0.10

#: Recomputation that baselines may choose from, under the memory limit, is what Megatron-LM offers: nothing; norms,
#: activation functions and latent up-projections (selective); selective and the MoE layer whole, its all-to-alls
#: included; everything whole. AF-pipe's planner has its own levers. Overlap of different micro-batches goes with the
#: first two only (Megatron's guide advises against it under full recomputation; DeepSeek-V3 uses selective).
#: PP and v of baselines: every PP whose world divides, every v that leaves a chunk a layer; the fastest that fits wins.

#: What the paper's AF-pipe has, and ours for its figures: one copy per (token, expert), equal depths, interleaved 1F1B,
#: no split backward; A_g and F_g share nodes; any A:F ratio; memory levers as needed.
PAPER_DISPATCH = "per-expert"


@dataclass(frozen=True)
class Setting:
    """What a figure is about where the paper doesn't say: model, sequence lengths, bytes per parameter if not as "
    "usual."""

    model: str
    sequences: tuple[int, ...]
    why: str
    bytes_per_parameter: int | None = None


SETTINGS: dict[str, Setting] = {
    "fig5": Setting("qwen3-235b-a22b", (4096,), "figure 6's model; neither is given"),
    "fig6a": Setting(
        "qwen3-235b-a22b", (4096, 32768), "given; forward and backward of one layer, nothing recomputed, EP = 16"
    ),
    "fig11": Setting("deepseek-moe-16b", (8192,), "given"),
    "fig12": Setting(
        "qwen3-235b-a22b",
        (4096, 16384),
        "figure 6's model, on whose measurements the paper's allocation rests. 12 bytes a parameter are the most at "
        "which all four published allocations hold its experts: of 128 GPUs 43 are FFN's at 16:8, 95 GB each at 18, "
        "64 GB at 12",
        bytes_per_parameter=12,
    ),
    "fig13": Setting("deepseek-moe-16b", (8192,), "the one model with 64 experts; the length of figure 11"),
    "fig14": Setting(
        "gpt-oss-120b",
        (4096,),
        "the model whose 36 layers make v = L / p about 1, 2, 4, 8, 16 and 32 on groups that divide 128 GPUs",
    ),
}

assert set(ORIGINS) == {field.name for field in fields(Constants)}
