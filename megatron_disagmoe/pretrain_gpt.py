"""Pretrain a GPT with nothing but the packages from PyPI (the wheel of Megatron has no pretrain_gpt.py).

    torchrun --nproc-per-node W -m megatron_disagmoe.pretrain_gpt <Megatron flags> [AF flags]

Same flags, same numbers as Megatron's own script for a plain GPT, on mock or indexed data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_disagmoe.errors import bad_input_ends_the_job
from megatron_disagmoe.preparation import prepare


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of ``python -m megatron_disagmoe.pretrain_gpt``."""
    with bad_input_ends_the_job():
        sys.argv[1:] = prepare(sys.argv[1:] if arguments is None else arguments)
    from megatron_disagmoe import gpt_task

    gpt_task.train()


if __name__ == "__main__":
    main()
