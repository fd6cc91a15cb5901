"""What git has on record about a checkout; a plain folder is a checkout without records."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.patching.diffs import git


@dataclass(frozen=True)
class GitState:
    """Read-only view of the repository that ``root`` lies in."""

    root: Path

    def recorded(self, path: str) -> list[str]:
        """Ids of what is committed and what is staged of ``path``; "unmerged" for a file in the midst of a merge.

        Empty where git does not track the file.
        """
        if not self._ask("ls-files", "--", path):
            return []
        committed = self._ask("rev-parse", "--verify", "--quiet", f"HEAD:./{path}", may_fail=True)
        staged = self._ask("rev-parse", "--verify", "--quiet", f":./{path}", may_fail=True) or "unmerged"
        return [identity for identity in (committed, staged) if identity]

    def identity(self, path: str, content: bytes) -> str:
        """Id that ``content`` would have as ``path``."""
        return self._ask("hash-object", "--path", path, "--stdin", stdin=content)

    def changed(self) -> list[str]:
        """Tracked files below ``root`` that differ from the last commit, staged or not."""
        names = self._ask("diff", "--name-only", "-z", "--relative", "HEAD", may_fail=True)
        return [name for name in names.split("\0") if name]

    def _ask(self, *words: str, stdin: bytes = b"", may_fail: bool = False) -> str:
        code, out, error = _run(self.root, words, stdin)
        if code and not may_fail:
            raise ValueError(f"git {words[0]} fails in {self.root}: {error.strip()}")
        return "" if code else out.strip()


def git_state(root: Path) -> GitState | None:
    """State of the repository around ``root``, ``None`` for a plain folder.

    Raises:
        ValueError: there is a repository that git refuses to read.
    """
    code, out, error = _run(root, ["rev-parse", "--is-inside-work-tree"], b"")
    if code == 0:
        return GitState(root) if out.strip() == "true" else None
    if "not a git repository" in error:
        return None
    raise ValueError(f"git cannot read the repository at {root}: {error.strip()}")


def _run(root: Path, words: Sequence[str], stdin: bytes) -> tuple[int, str, str]:
    done = subprocess.run(
        [git(), *words],
        cwd=root,
        input=stdin,
        capture_output=True,
        check=False,
        env=os.environ | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr)
