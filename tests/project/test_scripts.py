"""The scripts' common ground: a Python that really runs is found, and where there is none, what to do is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "bash dirname grep head tail cat awk df cksum uname mkdir rm env".split()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH of its own with the tools that the scripts use, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        (folder / tool).symlink_to(found)
    return folder


def program(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def sourced(command: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``command`` in a shell that has sourced scripts/lib.sh."""
    home = {"HOME": str(path.parent), "PATH": str(path)}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source {ROOT}/scripts/lib.sh; {command}"],
        env=home | environment,
        capture_output=True,
        text=True,
        check=False,
    )


REAL = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\necho 'The command exists elsewhere' >&2\nexit 127\n"
OLD = "#!/bin/sh\necho 'it is 3.9, older than 3.12' >&2\nexit 1\n"


def test_one_that_does_not_run_is_passed_over(path: Path) -> None:
    program(path / "python3.12", SHIM)
    program(path / "python3.13", REAL)
    found = sourced("find_python", path)
    assert (found.returncode, found.stdout.strip()) == (0, sys.executable)


def test_one_that_only_pyenv_has(path: Path) -> None:
    program(path.parent / ".pyenv" / "versions" / "3.12.9" / "bin" / "python3.12", REAL)
    assert sourced("find_python", path).stdout.strip() == sys.executable


def test_none(path: Path) -> None:
    program(path / "python3.12", SHIM)
    program(path / "python3", OLD)
    found = sourced("find_python", path)
    assert (found.returncode, found.stdout) == (1, "")
    assert f"{path}/python3.12: exit 127: pyenv: python3.12: command not found" in found.stderr
    assert f"{path}/python3: exit 1: it is 3.9, older than 3.12" in found.stderr
    for remedy in ("apt install python3.12", "pyenv install 3.12", "uv python install 3.12", "DISAGMOE_PYTHON="):
        assert remedy in found.stderr


def test_the_one_the_user_names_and_no_other(path: Path) -> None:
    program(path / "python3.12", REAL)
    old = program(path.parent / "old", OLD)
    assert sourced("find_python", path, DISAGMOE_PYTHON=str(old)).returncode == 1


def test_a_folder_in_the_way_is_not_removed(path: Path) -> None:
    program(path / "python3.12", REAL)
    folder = path.parent / "mine"
    (folder / "kept").mkdir(parents=True)
    made = sourced("ensure_environment ''", path, DISAGMOE_VENV=str(folder))
    assert made.returncode == 1
    assert f"{folder} exists and is no virtual environment" in made.stderr
    assert (folder / "kept").is_dir()


@pytest.mark.parametrize("extras, size", [("", "2.9 GB to download"), ("dev", "3.1 GB to download")])
def test_size_is_said_and_room_is_checked_before_anything_is_fetched(path: Path, extras: str, size: str) -> None:
    program(path / "python3.12", REAL)
    (path / "df").unlink()
    program(path / "df", "#!/bin/sh\necho header\necho disk 9 9 1000000 9% /\n")
    made = sourced(f"ensure_environment '{extras}'", path, DISAGMOE_VENV=str(path.parent / "new"))
    assert made.returncode == 1
    assert size in made.stderr
    assert "only 1 GB free" in made.stderr
    assert not (path.parent / "new").exists()


def test_a_second_run_is_quick(path: Path) -> None:
    """pip runs once, and again only where what it depends on has changed."""
    venv = path.parent / "venv"
    (venv / "pyvenv.cfg").parent.mkdir()
    (venv / "pyvenv.cfg").touch()
    log = path.parent / "log"
    program(venv / "bin" / "python", f'#!/bin/sh\ncase "$*" in *pip*) echo "$*" >>{log} ;; -V) echo 3.12 ;; esac\n')
    for words in ("ensure_environment ''", "ensure_environment ''", "ensure_environment dev", "ensure_environment ''"):
        assert sourced(words, path, DISAGMOE_VENV=str(venv)).returncode == 0
    first, second = log.read_text().splitlines()
    assert first.endswith(f"--editable {ROOT}")
    assert second.endswith(f"--editable {ROOT}[dev]")


def test_quickstart_says_how_it_is_used() -> None:
    shown = subprocess.run(
        [ROOT / "scripts" / "quickstart.sh", "--help"], env=os.environ, capture_output=True, text=True, check=True
    )
    assert "--compare" in shown.stdout
