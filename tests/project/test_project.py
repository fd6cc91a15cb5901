"""Promises of the project as a whole: documents, pins, layers, commands."""

from __future__ import annotations

import importlib
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from megatron_disagmoe.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])

PURE = """
import importlib, pkgutil, sys
for name in ("topology", "model_layers", "arguments", "schedules", "builders", "simulator", "planner", "reproduction"):
    module = importlib.import_module(f"megatron_disagmoe.{name}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(found.name)
sys.exit(", ".join(sorted({"torch", "megatron"} & set(sys.modules))) or 0)
"""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_are_there(document: Path) -> None:
    ours = "scripts|docs|tests|configs|patches|megatron_disagmoe"
    named = re.findall(rf"`((?:{ours})/[\w./*-]+?)/?`", document.read_text())
    assert not [name for name in named if not list(ROOT.glob(name))]


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    names = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not [name for name in names if f"({name})" not in index]


def pins() -> dict[str, str]:
    found = {}
    for requirement in itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        match = re.fullmatch(r"([\w.-]+)(\[[\w,]+\])?==([\w.+]+)", requirement)
        assert match, f"{requirement} is not pinned to one version"
        found[match[1]] = match[3]
    return found


def test_dependencies_are_pinned_once_and_explained() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    for name, version in pins().items():
        assert f"`{name}" in explained, name
        pinned = re.search(rf"^{name.replace('-', '[-_]')}==(\S+)$", constraints, re.IGNORECASE | re.MULTILINE)
        if name != "transformer-engine":  # needs a GPU, so the constraints were made without it
            assert pinned, name
            assert pinned[1] == version, name


def test_pure_code_imports_neither_torch_nor_megatron() -> None:
    done = subprocess.run([sys.executable, "-c", PURE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command: str) -> None:
    assert importlib.import_module(COMMANDS[command][0]).app


def test_wheel_holds_what_is_read_at_run_time(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building writes into the folder
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    subprocess.run(
        ["tar", "-C", str(ROOT), "--null", "-T", "-", "-cf", str(tmp_path / "source.tar"), "--ignore-failed-read"],
        input=tracked.stdout, check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(["tar", "-C", str(source), "-xf", str(tmp_path / "source.tar")], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern in ("configs/**/*.yaml", "configs/**/*.flags", "patches/**/*.patch", "patches/index.toml"):
        shipped = [f"megatron_disagmoe/{path.relative_to(source)}" for path in source.glob(pattern)]
        assert shipped
        assert set(shipped) <= names
    assert {f"megatron_disagmoe/drawing/viewer.{kind}" for kind in ("css", "html", "js")} <= names
    assert {name.split("/")[0] for name in names} == {
        "megatron_disagmoe",
        next(name.split("/")[0] for name in names if ".dist-info/" in name),
    }
