"""Contents with and without a set of patches, by ``git apply`` on copies in a scratch folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_disagmoe.patching.index import Patch

Contents = dict[str, bytes]


def transform(contents: Mapping[str, bytes], patches: Sequence[Patch], *, reverse: bool = False) -> Contents | None:
    """``contents`` (bytes by path) after the parts of ``patches`` that concern them; ``None`` where one doesn't fit.

    ``reverse`` takes the patches back. Context must match exactly; only line numbers may have moved.

    Raises:
        ValueError: there is no git on PATH.
    """
    with tempfile.TemporaryDirectory(prefix="disagmoe-patch-") as name:
        scratch = Path(name).resolve()
        for path, content in contents.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            (scratch / path).write_bytes(content)
        for patch in reversed(patches) if reverse else patches:
            paths = [path for path in patch.paths if path in contents]
            if paths and not _apply(patch, paths, scratch, reverse=reverse):
                return None
        return {path: (scratch / path).read_bytes() for path in contents}


def _apply(patch: Patch, paths: Sequence[str], scratch: Path, *, reverse: bool) -> bool:
    options = ["--whitespace=nowarn", *(f"--include={path}" for path in paths), *(["--reverse"] if reverse else [])]
    done = subprocess.run(
        [git(), "-c", "core.autocrlf=false", "apply", *options, "-"],
        input=patch.text.encode(),
        cwd=scratch,
        env=_without_repository(scratch),
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def git() -> str:
    """Path of the ``git`` program; ``ValueError`` where there is none."""
    found = shutil.which("git")
    if found is None:
        raise ValueError("patching needs git, and it is not on PATH: install it (Debian, Ubuntu: apt install git)")
    return found


def _without_repository(scratch: Path) -> dict[str, str]:
    """An environment in which git sees a plain folder, whatever surrounds it and whatever the user has configured."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return kept | {
        "GIT_CEILING_DIRECTORIES": str(scratch.parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C",
    }
