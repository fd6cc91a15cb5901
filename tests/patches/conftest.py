"""A Megatron-LM checkout made of the installed package, which lacks only the scripts beside ``megatron/``."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

import pytest

PATCHED_FILE = "megatron/core/__init__.py"
PACKAGE_INFO = "megatron/core/package_info.py"


def installed_megatron() -> Path:
    """The folder ``megatron`` of the wheel, whatever ``sys.path`` holds before it."""
    return Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron")))


@pytest.fixture(scope="session")
def pristine_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of Megatron, laid out as a checkout; not to be changed."""
    root = tmp_path_factory.mktemp("pristine") / "Megatron-LM"
    shutil.copytree(installed_megatron(), root / "megatron")
    return root


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The part of such a checkout that patching looks at, to be changed at will; a plain folder."""
    root = tmp_path / "Megatron-LM"
    for path in (PATCHED_FILE, PACKAGE_INFO, "megatron/core/utils.py"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(installed_megatron().parent / path, root / path)
    return root


@pytest.fixture
def repository(checkout: Path) -> Path:
    """``checkout`` as a git repository with everything committed."""
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    commit(checkout, "as released")
    return checkout


def git(root: Path, *words: str) -> str:
    """Run git in ``root`` with a name to commit under."""
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout


def commit(root: Path, message: str) -> None:
    """Commit what is staged."""
    git(root, "commit", "-q", "-m", message)
