"""Published rows that cannot come out of any model of this kind, with the arithmetic; written before the first run.

Only figures that the paper publishes go into the arithmetic. Rows listed here are still computed and shown, counted as
published and as not holding; nothing was added after the first comparison.

Legend: per token, layer and GPU, in units of the time of all all-to-alls of Qwen3 at 4K with EP = 16 (figure 6a):
attention 0.542, FFN 0.367, all-to-alls 1 at 4K; 16K interpolated: attention 0.912, FFN 0.378.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unreproducible:
    """One published row, by figure and quantity, and why it cannot hold."""

    figure: str
    quantity: str
    why: str


UNREPRODUCIBLE: tuple[Unreproducible, ...] = (
    Unreproducible(
        "fig13",
        "greatest gain over Megatron-1F1B",
        "1.92x at top-16. Bytes and FLOPs of experts both grow with k, so their ratio stays: figure 6a's 1 / 0.367 = "
        "2.7 for Qwen3, and 237 over 217 bytes a MFLOP times that, 3.0, for DeepSeek-MoE's experts. One copy per "
        "(token, expert) sends as many bytes off the node in AF-pipe as co-located EP = 16 does, so a step takes at "
        "least the transfers' 3.0 of the baseline's 4.0 plus attention's share (at most 0.5 at k = 16): (3.0 + 1 + "
        "0.5) / 3.0 = 1.5x at most, 1.65x with transfers 10% faster than NCCL's.",
    ),
    Unreproducible(
        "fig13",
        "place of the greatest gain: top-k",
        "For the same reason the gain is capped by 1 + compute / transfers, which falls as k grows and attention's "
        "share of compute shrinks: the widest gain cannot be at top-16.",
    ),
    Unreproducible(
        "fig12",
        "16K: A:F = 16:8 over Megatron-1F1B",
        "About 1x. At 16K both 16:10 and 16:8 are bound by attention (0.912 / 16 = 0.057 against FFN's 0.378 / 10 = "
        "0.038 and 0.378 / 8 = 0.047), with NICs at 16:16 in both cases, so 24 GPUs do what 26 do: per GPU 16:8 is "
        "ahead of 16:10's 1.56x by 26 / 24. (With 8 NICs on the FFN side it would be about 1.0x.)",
    ),
    Unreproducible(
        "fig12",
        "16K: best A:F",
        "16:10 cannot be the best of the four while 16:8 is ahead of it: see the row above.",
    ),
    Unreproducible(
        "fig11",
        "reduction of exposed communication against Comet",
        "88% against Tutel and 75% against Comet say that Comet exposes 0.12 / 0.25 = 48% of what Tutel does. Both "
        "hide FFN alone, at most all of it. All-to-alls take 3.0 times as long as DeepSeek-MoE's FFN, so Comet "
        "exposes at least 2.0 and Tutel at most 3.0: never below 67%. Both reductions cannot hold at once; Tutel's is "
        "kept as the one to check.",
    ),
    Unreproducible(
        "fig14",
        "v at which memory runs out",
        "v = L / p rises where p falls, and then every group holds more layers but the world has as many GPUs: "
        "parameters a GPU stay the same, live activations a group are at most 4 L micro-batch-layers whatever p is, "
        "and a micro-batch of a wider group is shared by as many more GPUs. Nothing but rounding grows with v, so v = "
        "32 fits wherever v = 16 does.",
    ),
)


def reason(figure: str, quantity: str) -> str | None:
    """Why a row cannot hold; None where it may."""
    for row in UNREPRODUCIBLE:
        if (row.figure, row.quantity) == (figure, quantity):
            return row.why
    return None
