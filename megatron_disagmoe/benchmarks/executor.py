"""``disagmoe bench executor``: what the executor costs a rank beyond Megatron's modules, on the smallest of models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_disagmoe.benchmarks.executor_job import ENVIRONMENT
from megatron_disagmoe.local_job import Job, run

#: Microseconds of processor time an action, at most; the median of the steps.
BAR = 150.0

_FLAGS = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --ffn-hidden-size 32 --normalization RMSNorm "
    "--position-embedding-type rope --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 "
    "--micro-batch-size 1 --global-batch-size 16 --train-iters 33 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 131 --log-interval 100 --eval-interval 1000 --eval-iters 1 --af-pipe"
).split()

#: Attention groups, FFN groups, schedule, transport, dispatch.
CASES = (
    (1, 1, "interleaved-1f1b", "torch", "per-rank"),
    (1, 1, "interleaved-1f1b", "torch", "per-expert"),
    (1, 1, "split-backward", "torch", "per-rank"),
    (2, 2, "interleaved-1f1b", "torch", "per-rank"),
)


def measure(cases: Sequence[tuple[int, int, str, str, str]], folder: Path) -> list[dict[str, Any]]:
    """One row for each group of each case.

    Raises:
        RuntimeError: where a run fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "metered.py"
    script.write_text("from megatron_disagmoe.benchmarks import executor_job\n\nexecutor_job.main()\n")
    jobs = []
    for number, (attention_groups, ffn_groups, schedule, transport, dispatch) in enumerate(cases):
        flags = [
            *_FLAGS,
            *("--af-attention-groups", str(attention_groups)),
            *("--af-ffn-groups", str(ffn_groups)),
            *("--af-schedule", schedule),
            *("--af-transport", transport),
            *("--af-dispatch", dispatch),
        ]
        environment = {ENVIRONMENT: str(folder / f"case{number}")}
        world_size = attention_groups + ffn_groups
        jobs.append(Job(f"job{number}", world_size, flags, script=str(script), environment=environment))
    for result in run(jobs, folder / "jobs"):
        result.checked()
    rows = []
    for number, (_, _, schedule, transport, dispatch) in enumerate(cases):
        for path in sorted((folder / f"case{number}").glob("rank*.json")):
            rows.append(_row(json.loads(path.read_text()), schedule, transport, dispatch))
    return rows


def _row(found: dict[str, Any], schedule: str, transport: str, dispatch: str) -> dict[str, Any]:
    """The median of the steps, and the least: whatever else runs on the machine costs caches, and so time.

    ``holds_per_action``: an action is what the schedule lists, transfers too. ``holds``: a compute action with all its
    transfers counts as one.
    """
    steps = found["steps"]
    computes, actions = steps[0]["compute_actions"], steps[0]["actions"]
    ours = [step["ours"] * 1e6 for step in steps]
    return {
        "group": found["group"],
        "schedule": schedule,
        "transport": transport,
        "dispatch": dispatch,
        "steps": len(steps),
        "compute_actions": computes,
        "actions": actions,
        "overhead_us_per_compute_action": min(ours) / computes,
        "overhead_us_per_action": min(ours) / actions,
        "median_overhead_us_per_compute_action": statistics.median(ours) / computes,
        "median_overhead_us_per_action": statistics.median(ours) / actions,
        "modules_us_per_compute_action": min(step["modules"] for step in steps) * 1e6 / computes,
        "holds_per_action": statistics.median(ours) / actions <= BAR,
        "holds": statistics.median(ours) / computes <= BAR,
    }
