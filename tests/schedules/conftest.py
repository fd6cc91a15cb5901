"""Says after a run how many schedules and mutations the verifier was tried on."""

from __future__ import annotations

from typing import Any

from tests.schedules.mutations import TRIED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the counts of ``TRIED``."""
    if TRIED:
        terminalreporter.section("verifier against the oracle")
        for (name, verdict), count in sorted(TRIED.items()):
            terminalreporter.write_line(f"{count:6d}  {name}: {verdict}")
