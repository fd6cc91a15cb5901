"""Which tests may run beside others: those in folders that start ranks follow one another in one worker.

With ``pytest -n 2 --dist loadgroup`` (``scripts/test.sh``) the other worker takes everything else meanwhile. Without
``-n`` nothing changes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
#: Folders whose tests start several processes, or watch those of this machine.
_START_PROCESSES = frozenset(
    {
        *("benchmarks", "checkpoint", "cpu", "model", "parity", "patches", "project", "quickstart"),
        *("runtime", "tracing", "training", "transport"),
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of those folders into one group."""
    for item in items:
        if item.path.relative_to(_TESTS).parts[0] in _START_PROCESSES:
            item.add_marker(pytest.mark.xdist_group("ranks"))
