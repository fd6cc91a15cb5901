"""How a training process ends on bad input: one message for the whole job, exit code 2."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

GRACE_SECONDS = 45.0
"""How long the other ranks wait for rank 0 to print and end, so that torchrun does not stop it before it has.

On a busy machine the ranks' imports end many seconds apart; once rank 0 has ended, torchrun ends the others at once."""


def exit_with_message(message: str) -> NoReturn:
    """Print ``message`` on rank 0 alone and exit 2 on every rank.

    torchrun ends all ranks as soon as one has failed, and every rank finds the same fault at its own pace; so the
    others wait for rank 0, and it is rank 0's exit that ends the job.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"disagmoe: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_SECONDS)
    raise SystemExit(2)


@contextlib.contextmanager
def bad_input_ends_the_job() -> Iterator[None]:
    """Turn a ``ValueError`` (what the user can mend) into ``exit_with_message``."""
    try:
        yield
    except ValueError as error:
        exit_with_message(str(error))
