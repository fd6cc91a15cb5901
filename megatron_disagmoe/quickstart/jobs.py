"""The quickstart's two training jobs as command lines: AF-pipe, and plain Megatron on the same data."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.files import shipped_folder
from megatron_disagmoe.quickstart import dataset


@dataclass(frozen=True)
class Job:
    """``title`` is for people, ``name`` for folders; ``flags`` is what makes it differ from the other job."""

    name: str
    title: str
    processes: int
    flags: tuple[str, ...]


AF_PIPE = Job(
    name="af-pipe",
    title="AF-pipe",
    processes=4,
    flags=(
        "--af-pipe",
        *("--af-attention-groups", "2"),
        *("--af-attention-ranks", "1", "--af-ffn-ranks", "1"),
    ),
)
#: What AF-pipe must equal: no pipeline, data-parallel size M * R = 1.
VANILLA = Job(name="vanilla", title="plain Megatron", processes=1, flags=())

#: On the CPU also where there is a GPU: the ranks outnumber the devices of most machines. One thread a process: the
#: ranks share the cores, and both jobs then add in the same order.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}


def flags_file() -> Path:
    """The model and training flags both jobs share."""
    return shipped_folder("configs") / "runs" / "quickstart.flags"


def read_flags(path: Path) -> list[str]:
    """The words of a flags file, without its comments."""
    return shlex.split(path.read_text(), comments=True)


def command(job: Job, *, steps: int, data: Path, checkpoints: Path) -> list[str]:
    """The whole command line of ``job``, ready to be run (and copied) from anywhere."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes)),
        *("-m", "megatron_disagmoe.pretrain_gpt"),
        *read_flags(flags_file()),
        *dataset.megatron_flags(data),
        *("--train-iters", str(steps), "--lr-decay-iters", str(steps)),
        *("--save", str(checkpoints), "--save-interval", str(steps)),
        *job.flags,
    ]
