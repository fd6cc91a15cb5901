"""Run an unmodified Megatron pretrain script with this package's support around it.

    torchrun --nproc-per-node W -m megatron_disagmoe.launch path/to/pretrain_gpt.py <Megatron flags> [AF flags]

Without ``--af-pipe`` the script is plain Megatron, on a machine without CUDA too.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_disagmoe.errors import bad_input_ends_the_job
from megatron_disagmoe.preparation import prepare

USAGE = "usage: torchrun [...] -m megatron_disagmoe.launch path/to/pretrain_gpt.py <Megatron flags> [AF flags]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of ``python -m megatron_disagmoe.launch``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with bad_input_ends_the_job():
        script = _script(words)
        sys.path.insert(0, str(script.parent))
        flags = prepare(words[1:])
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")


def _script(words: list[str]) -> Path:
    if not words or words[0].startswith("-"):
        raise ValueError(f"the first word must be a pretrain script\n{USAGE}")
    script = Path(words[0]).resolve()
    if not script.is_file():
        raise ValueError(f"there is no script {words[0]}\n{USAGE}")
    return script


if __name__ == "__main__":
    main()
