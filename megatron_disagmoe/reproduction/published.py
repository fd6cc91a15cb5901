"""The paper's numbers (arXiv 2605.11005v1), as its abstract and retellings of its figures give them."""

from __future__ import annotations

#: Sequence lengths of figure 10, and the models in its order: name of the shipped file, experts per token there.
SEQUENCES = (4096, 8192, 16384, 32768)
MODELS: tuple[tuple[str, int], ...] = (("deepseek-moe-16b", 4), ("gpt-oss-120b", 4), ("qwen3-235b-a22b", 8))

#: Figure 5: share of all-to-alls in a step, EP over 1 and over 8 nodes.
FIG5 = {1: 0.22, 8: 0.78}
#: Figure 6a: Qwen3 on 8 nodes; shares of time by sequence length: attention, FFN (communication is the rest).
FIG6A = {4096: (0.2838, 0.1922), 32768: (0.5026, 0.1396)}
#: Figure 10: AF-pipe over each baseline, least and greatest.
FIG10 = {
    "Megatron-1F1B": (1.59, 1.81),
    "Tutel and Comet": (1.2, 1.5),
    "DualPipe": (1.05, 1.13),
}
#: Figure 11: DeepSeek-MoE at 8K; reduction of exposed communication against each.
FIG11 = {"Tutel": 0.88, "Comet": 0.75, "DualPipe": 0.45}
#: Figure 12: A:F at NICs 16:16 by sequence length: the best; and at 16K each one's gain over Megatron-1F1B.
FIG12_BEST = {4096: (16, 16), 16384: (16, 10)}
FIG12_16K = {(16, 10): 1.56, (16, 16): 1.21, (16, 8): 1.0, (8, 16): 1.0}
FIG12_OVER_EVEN = 1.29
#: Figure 13: 64 experts, these top-k: least and greatest gain, and where it is greatest.
FIG13_TOP_K = (2, 4, 8, 16)
FIG13 = (1.08, 1.92)
FIG13_WIDEST = 16
#: Figure 14: throughput rises with v up to 16, then memory runs out.
FIG14_V = (1, 2, 4, 8, 16, 32)
FIG14_BEST = 16
