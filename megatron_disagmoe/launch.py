"""Run an unmodified Megatron pretrain script with this package's support around it.

    torchrun --nproc-per-node W -m megatron_disagmoe.launch path/to/pretrain_gpt.py <Megatron flags> [AF flags]

Without ``--af-pipe`` the script is plain Megatron, on a machine without CUDA too.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_disagmoe.errors import bad_input_ends_the_job

USAGE = "usage: torchrun [...] -m megatron_disagmoe.launch path/to/pretrain_gpt.py <Megatron flags> [AF flags]"


def prepare(arguments: Sequence[str]) -> list[str]:
    """Make Megatron ready for this machine and for the AF flags; the flags to run with.

    ``arguments`` are the flags without the script. Everything that must happen before the first import of
    Megatron happens here, so call it before that, with ``sys.path`` as the script will see it.
    ``ValueError`` for what the user can mend, ``SeamGone`` for a Megatron whose parts are not where they should be.
    """
    added = make_ready(arguments)
    from megatron_disagmoe.training import install

    if added and os.environ.get("RANK", "0") == "0":
        print(f"disagmoe: no CUDA device, so Megatron runs on the CPU, with {' '.join(added)}", flush=True)
    flags = [*arguments, *added]
    install.install_plugin(flags)
    return flags


def make_ready(arguments: Sequence[str]) -> list[str]:
    """The part of ``prepare`` that Megatron needs to be imported here at all; the flags that this machine needs too."""
    from megatron_disagmoe import cpu, hook

    hook.stand_down()
    added = cpu.flags(arguments) if cpu.is_needed() else []
    cpu.install_if_needed()

    from megatron_disagmoe import megatron_seams, upstream_fixes

    megatron_seams.check_version()
    upstream_fixes.install()
    return added


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
