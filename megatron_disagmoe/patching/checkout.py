"""Look at a Megatron-LM checkout, patch it, take the patches back."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_disagmoe.patching.diffs import Contents, transform
from megatron_disagmoe.patching.git_state import GitState, git_state
from megatron_disagmoe.patching.index import Patch, Release, releases
from megatron_disagmoe.patching.writing import replace_all

PACKAGE_INFO = "megatron/core/package_info.py"
_SHOWN = 5

FileStateName = Literal["unpatched", "patched", "conflict"]
State = Literal["unpatched", "patched", "partial", "conflict", "unknown-version"]


@dataclass(frozen=True)
class FileState:
    """One file that patches concern. ``conflict``: neither do all of them fit, nor can all be taken back."""

    path: str
    state: FileStateName
    patches: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What was found. ``errors`` are the reasons, with remedies, why this tool will not write there.

    ``other_changes``: uncommitted changes in files that no patch concerns; they keep patches out, not in.
    ``changed``: the files that were written.
    """

    version: str
    state: State
    files: tuple[FileState, ...] = ()
    errors: tuple[str, ...] = ()
    other_changes: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """As ``disagmoe patch --json`` prints it."""
        return asdict(self) | {"ok": not self.errors}


def inspect(root: Path, *, patches_folder: Path | None = None) -> Report:
    """What state the checkout at ``root`` (the folder that holds ``megatron/``) is in; writes nothing.

    Raises:
        ValueError: ``root`` is no Megatron checkout, or its state cannot be told.
    """
    return _Inspection(root, patches_folder).report()


def apply(root: Path, *, patches_folder: Path | None = None) -> Report:
    """Patch every file that is not patched yet; all of them or none. Refuses a tree with uncommitted changes.

    Raises:
        ValueError: with every reason, where ``inspect`` finds errors.
    """
    return _write(root, patches_folder, wanted="patched")


def revert(root: Path, *, patches_folder: Path | None = None) -> Report:
    """Take the patches out of every file that has them; all of them or none.

    Raises:
        ValueError: with every reason, where ``inspect`` finds errors.
    """
    return _write(root, patches_folder, wanted="unpatched")


def megatron_version(root: Path) -> str:
    """Version of Megatron Core in ``root``, read and not imported: ``megatron`` on ``sys.path`` may be another one.

    Raises:
        ValueError: there is none, or not in the form known to us.
    """
    file = root / PACKAGE_INFO
    if not file.is_file():
        raise ValueError(
            f"{root} is no Megatron-LM checkout, it has no {PACKAGE_INFO}: give the folder that holds megatron/, as "
            "made by: git clone --branch core_v0.19.0 https://github.com/NVIDIA/Megatron-LM"
        )
    values: dict[str, Any] = {}
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            values |= {name.id: statement.value.value for name in statement.targets if isinstance(name, ast.Name)}
    try:
        return "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format_map(values)
    except KeyError as error:
        raise ValueError(f"{file} does not say which version it is: it sets no {error.args[0]}") from error


class _Inspection:
    """One look at a checkout, with the contents that writing needs."""

    def __init__(self, root: Path, patches_folder: Path | None) -> None:
        if not root.is_dir():
            raise ValueError(f"there is no folder {root}")
        self.root = root.resolve()
        self.version = megatron_version(self.root)
        self.known = releases(patches_folder)
        self.release = next((one for one in self.known if self.version in one.versions), None)
        self.unpatched: Contents = {}
        self.patched: Contents = {}
        self.files = tuple(self._look_at(path, self.release) for path in self.release.paths) if self.release else ()

    def report(self, changed: Sequence[str] = ()) -> Report:
        git = git_state(self.root)
        state = self._state()
        return Report(
            version=self.version,
            state=state,
            files=self.files,
            errors=tuple(self.errors(git, wanted="unpatched" if state == "patched" else "patched")),
            other_changes=self._other_changes(git),
            changed=tuple(changed),
        )

    def _other_changes(self, git: GitState | None) -> tuple[str, ...]:
        return tuple(sorted({*git.changed()} - {file.path for file in self.files})) if git else ()

    def _look_at(self, path: str, release: Release) -> FileState:
        patches = [patch for patch in release.patches if path in patch.paths]
        names = tuple(patch.name for patch in patches)
        state: FileStateName = "conflict"
        if (self.root / path).is_file():
            state = self._state_of(path, (self.root / path).read_bytes(), patches)
        return FileState(path=path, state=state, patches=names)

    def _state_of(self, path: str, content: bytes, patches: Sequence[Patch]) -> FileStateName:
        without = transform({path: content}, patches, reverse=True)
        if without is not None:
            self.unpatched |= without
            self.patched[path] = content
            return "patched"
        with_them = transform({path: content}, patches)
        if with_them is not None:
            self.unpatched[path] = content
            self.patched |= with_them
            return "unpatched"
        return "conflict"

    def _state(self) -> State:
        if self.release is None:
            return "unknown-version"
        states = {file.state for file in self.files}
        if "conflict" in states:
            return "conflict"
        return "partial" if len(states) > 1 else states.pop()

    def errors(self, git: GitState | None, *, wanted: Literal["patched", "unpatched"]) -> list[str]:
        """Why this checkout cannot be brought into the state ``wanted``, with remedies."""
        if self.release is None:
            versions = ", ".join(version for release in self.known for version in release.versions)
            tags = ", ".join(release.tag for release in self.known)
            message = (
                f"there are no patches for Megatron Core {self.version} at {self.root}, only for {versions}: "
                f"git checkout one of {tags}; if it was patched before it moved, go back and revert first"
            )
            return [message]
        errors = [self._conflict(file) for file in self.files if file.state == "conflict"]
        if git is not None:
            dirty = [file.path for file in self.files if file.state != "conflict" and self._is_dirty(git, file.path)]
            errors += [
                f"{path} has uncommitted changes that are not ours: commit them, or undo them "
                f"(git restore --staged --worktree {path})"
                for path in dirty
            ]
        others = self._other_changes(git)
        if wanted == "patched" and self._state() != "patched" and others:
            shown = ", ".join(others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
            files = "1 tracked file" if len(others) == 1 else f"{len(others)} tracked files"
            errors.append(f"the tree is dirty, {files} changed ({shown}): commit or stash that")
        return errors

    def _conflict(self, file: FileState) -> str:
        if not (self.root / file.path).is_file():
            return f"{file.path} is missing: restore it (git restore {file.path})"
        return (
            f"{file.path} is neither as in Megatron Core {self.version} nor patched as {', '.join(file.patches)} does: "
            f"undo what changed it (git restore --staged --worktree {file.path}), then try again"
        )

    def _is_dirty(self, git: GitState, path: str) -> bool:
        """Whether git has anything on record but the contents that the file has without and with our patches."""
        ours = {git.identity(path, content[path]) for content in (self.unpatched, self.patched)}
        return not ours.issuperset(git.recorded(path))


def _write(root: Path, patches_folder: Path | None, *, wanted: Literal["patched", "unpatched"]) -> Report:
    inspection = _Inspection(root, patches_folder)
    errors = inspection.errors(git_state(inspection.root), wanted=wanted)
    if errors:
        raise ValueError("nothing was changed: " + "; ".join(errors))
    contents: Mapping[str, bytes] = inspection.patched if wanted == "patched" else inspection.unpatched
    changed = [file.path for file in inspection.files if file.state != wanted]
    if changed:
        replace_all(inspection.root, {path: contents[path] for path in changed})
    return _Inspection(root, patches_folder).report(changed)
