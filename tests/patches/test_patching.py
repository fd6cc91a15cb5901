"""Apply and revert: exact, idempotent, all or nothing, and refused where that cannot be had."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_disagmoe import patching
from megatron_disagmoe.patching.index import HEADER_FIELDS
from tests.patches.conftest import PACKAGE_INFO, PATCHED_FILE, commit, git

OTHER_FILE = "megatron/core/utils.py"


def tree(root: Path) -> dict[str, tuple[str, int]]:
    """Content hash and permissions of every file outside ``.git``."""
    return {
        str(file.relative_to(root)): (hashlib.sha256(file.read_bytes()).hexdigest(), stat.S_IMODE(file.stat().st_mode))
        for file in root.rglob("*")
        if file.is_file() and ".git" not in file.relative_to(root).parts
    }


def append(root: Path, path: str, text: str = "\nMINE = 1\n") -> None:
    with (root / path).open("a") as stream:
        stream.write(text)


class TestWholePackage:
    def test_apply_changes_one_file_and_revert_restores_every_byte(
        self, pristine_checkout: Path, tmp_path: Path
    ) -> None:
        root = tmp_path / "copy"
        shutil.copytree(pristine_checkout, root)
        before = tree(root)
        assert patching.inspect(root).state == "unpatched"

        report = patching.apply(root)
        assert (report.version, report.state, report.changed) == ("0.19.2", "patched", (PATCHED_FILE,))
        after = tree(root)
        assert {path for path in after if after[path] != before.get(path)} == {PATCHED_FILE}
        assert "from megatron_disagmoe.hook import activate" in (root / PATCHED_FILE).read_text()

        assert patching.revert(root).state == "unpatched"
        assert tree(root) == before


class TestPlainFolder:
    def test_again_changes_nothing(self, checkout: Path) -> None:
        assert patching.revert(checkout).changed == ()
        patching.apply(checkout)
        once = (tree(checkout), (checkout / PATCHED_FILE).stat().st_mtime_ns)
        assert patching.apply(checkout).changed == ()
        assert (tree(checkout), (checkout / PATCHED_FILE).stat().st_mtime_ns) == once

    def test_permissions_survive(self, checkout: Path) -> None:
        (checkout / PATCHED_FILE).chmod(0o640)
        patching.apply(checkout)
        assert tree(checkout)[PATCHED_FILE][1] == 0o640

    def test_changes_elsewhere_in_a_file_survive(self, checkout: Path) -> None:
        append(checkout, PATCHED_FILE)
        before = tree(checkout)
        patching.apply(checkout)
        assert (checkout / PATCHED_FILE).read_text().endswith("\nMINE = 1\n")
        patching.revert(checkout)
        assert tree(checkout) == before

    def test_changes_in_the_patched_region_are_a_conflict(self, checkout: Path) -> None:
        file = checkout / PATCHED_FILE
        file.write_text(file.read_text().replace("import torch\n", "import torch as t\n"))
        before = tree(checkout)
        report = patching.inspect(checkout)
        assert (report.state, report.files[0].state) == ("conflict", "conflict")
        for action in (patching.apply, patching.revert):
            with pytest.raises(ValueError, match=r"nothing was changed: .*neither as in Megatron Core 0.19.2 nor"):
                action(checkout)
        assert tree(checkout) == before

    def test_half_a_patch_is_a_conflict(self, checkout: Path) -> None:
        patching.apply(checkout)
        file = checkout / PATCHED_FILE
        file.write_text(file.read_text().replace("import sys\n\n", ""))
        with pytest.raises(ValueError, match="nothing was changed"):
            patching.revert(checkout)

    def test_missing_file(self, checkout: Path) -> None:
        (checkout / PATCHED_FILE).unlink()
        with pytest.raises(ValueError, match=f"{PATCHED_FILE} is missing: restore it"):
            patching.apply(checkout)

    @pytest.mark.parametrize("version", [("0", "18", "0"), ("0", "19", "3"), ("1", "0", "0")])
    def test_unknown_version(self, checkout: Path, version: tuple[str, str, str]) -> None:
        major, minor, patch = version
        (checkout / PACKAGE_INFO).write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ''\n")
        before = tree(checkout)
        report = patching.inspect(checkout)
        assert (report.version, report.state, report.files) == (".".join(version), "unknown-version", ())
        for action in (patching.apply, patching.revert):
            with pytest.raises(ValueError, match=r"only for 0.19.1, 0.19.2: git checkout one of core_v0.19.0"):
                action(checkout)
        assert tree(checkout) == before

    def test_release_candidate_is_another_version(self, checkout: Path) -> None:
        (checkout / PACKAGE_INFO).write_text("MAJOR = 0\nMINOR = 19\nPATCH = 2\nPRE_RELEASE = 'rc1'\n")
        assert patching.inspect(checkout).version == "0.19.2rc1"
        assert patching.inspect(checkout).state == "unknown-version"

    def test_no_version(self, checkout: Path) -> None:
        (checkout / PACKAGE_INFO).write_text("MAJOR = 0\n")
        with pytest.raises(ValueError, match="does not say which version it is: it sets no MINOR"):
            patching.inspect(checkout)

    def test_no_checkout(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is no Megatron-LM checkout"):
            patching.inspect(tmp_path)
        with pytest.raises(ValueError, match="there is no folder"):
            patching.inspect(tmp_path / "absent")

    def test_without_git(self, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match="patching needs git"):
            patching.apply(checkout)

    def test_git_settings_of_the_user_do_not_matter(
        self, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = tmp_path / "gitconfig"
        config.write_text("[core]\n\tautocrlf = true\n[apply]\n\twhitespace = fix\n")
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
        before = tree(checkout)
        monkeypatch.setattr(patching.checkout, "git_state", lambda root: None)
        patching.apply(checkout)
        assert b"\r" not in (checkout / PATCHED_FILE).read_bytes()
        patching.revert(checkout)
        assert tree(checkout) == before


class TestRepository:
    def test_round_trip_leaves_it_clean(self, repository: Path) -> None:
        assert patching.apply(repository).state == "patched"
        assert git(repository, "status", "--porcelain").split() == ["M", PATCHED_FILE]
        assert patching.apply(repository).changed == ()
        patching.revert(repository)
        assert git(repository, "status", "--porcelain") == ""

    @pytest.mark.parametrize("patched_first", [False, True])
    @pytest.mark.parametrize("staged", [False, True])
    def test_uncommitted_change_in_a_file_we_patch_is_refused(
        self, repository: Path, staged: bool, patched_first: bool
    ) -> None:
        if patched_first:
            patching.apply(repository)
        append(repository, PATCHED_FILE)
        if staged:
            git(repository, "add", PATCHED_FILE)
        before = tree(repository)
        for action in (patching.apply, patching.revert):
            with pytest.raises(ValueError, match=f"{PATCHED_FILE} has uncommitted changes that are not ours"):
                action(repository)
        assert tree(repository) == before

    def test_staged_change_that_was_undone_in_the_folder_is_refused(self, repository: Path) -> None:
        original = (repository / PATCHED_FILE).read_bytes()
        append(repository, PATCHED_FILE)
        git(repository, "add", PATCHED_FILE)
        (repository / PATCHED_FILE).write_bytes(original)
        with pytest.raises(ValueError, match="uncommitted changes that are not ours"):
            patching.apply(repository)

    def test_change_that_is_committed_is_welcome(self, repository: Path) -> None:
        append(repository, PATCHED_FILE)
        git(repository, "add", PATCHED_FILE)
        commit(repository, "mine")
        patching.apply(repository)
        patching.revert(repository)
        assert git(repository, "status", "--porcelain") == ""

    @pytest.mark.parametrize("staged", [False, True])
    def test_dirty_tree_is_not_patched(self, repository: Path, staged: bool) -> None:
        append(repository, OTHER_FILE)
        if staged:
            git(repository, "add", OTHER_FILE)
        before = tree(repository)
        with pytest.raises(ValueError, match=rf"the tree is dirty, 1 tracked file changed \({OTHER_FILE}\)"):
            patching.apply(repository)
        assert not patching.inspect(repository).as_json()["ok"]
        assert patching.revert(repository).changed == ()  # there is nothing to take back
        assert tree(repository) == before

    def test_patched_tree_may_get_dirty(self, repository: Path) -> None:
        patching.apply(repository)
        append(repository, OTHER_FILE)
        report = patching.apply(repository)
        assert (report.state, report.other_changes, report.errors) == ("patched", (OTHER_FILE,), ())
        assert patching.revert(repository).changed == (PATCHED_FILE,)
        assert (repository / OTHER_FILE).read_text().endswith("\nMINE = 1\n")

    def test_untracked_files_are_in_nobodys_way(self, repository: Path) -> None:
        (repository / "notes.txt").write_text("untracked\n")
        assert patching.apply(repository).state == "patched"

    def test_committed_patch_can_be_reverted_and_applied_again(self, repository: Path) -> None:
        patching.apply(repository)
        git(repository, "add", PATCHED_FILE)
        commit(repository, "patched")
        assert patching.apply(repository).changed == ()
        assert patching.revert(repository).changed == (PATCHED_FILE,)
        assert patching.apply(repository).changed == (PATCHED_FILE,)
        assert git(repository, "status", "--porcelain") == ""

    def test_staged_patch_can_be_reverted(self, repository: Path) -> None:
        original = (repository / PATCHED_FILE).read_bytes()
        patching.apply(repository)
        git(repository, "add", PATCHED_FILE)
        patching.revert(repository)
        assert (repository / PATCHED_FILE).read_bytes() == original

    def test_unmerged_file_is_refused(self, repository: Path) -> None:
        git(repository, "checkout", "-q", "-b", "other")
        append(repository, PATCHED_FILE, "THEIRS = 1\n")
        git(repository, "commit", "-q", "-a", "-m", "theirs")
        git(repository, "checkout", "-q", "-")
        original = (repository / PATCHED_FILE).read_bytes()
        append(repository, PATCHED_FILE, "MINE = 1\n")
        git(repository, "commit", "-q", "-a", "-m", "mine")
        with pytest.raises(Exception, match="non-zero exit status"):
            git(repository, "merge", "other")
        (repository / PATCHED_FILE).write_bytes(original)
        with pytest.raises(ValueError, match="uncommitted changes that are not ours"):
            patching.apply(repository)

    def test_folder_that_an_outer_repository_ignores_counts_as_plain(self, checkout: Path) -> None:
        outer = checkout.parent
        git(outer, "init", "-q")
        (outer / ".gitignore").write_text(f"{checkout.name}/\n")
        git(outer, "add", ".gitignore")
        commit(outer, "begin")
        before = tree(checkout)
        assert patching.apply(checkout).state == "patched"
        patching.revert(checkout)
        assert tree(checkout) == before

    def test_folder_inside_an_outer_repository(self, checkout: Path) -> None:
        outer = checkout.parent
        git(outer, "init", "-q")
        (outer / "beside.txt").touch()
        git(outer, "add", ".")
        commit(outer, "vendored")
        append(outer, "beside.txt")
        assert patching.apply(checkout).other_changes == ()  # what lies beside the checkout does not count
        append(checkout, OTHER_FILE)
        assert patching.apply(checkout).other_changes == (OTHER_FILE,)
        append(checkout, PATCHED_FILE)
        with pytest.raises(ValueError, match="uncommitted changes that are not ours"):
            patching.revert(checkout)

    def test_repository_that_git_refuses_to_read(self, repository: Path) -> None:
        (repository / ".git" / "config").write_text("[core\n")
        with pytest.raises(ValueError, match="git cannot read the repository"):
            patching.apply(repository)


class TestTwoFiles:
    """A set of two patches over two files, one of them touched by both."""

    @pytest.fixture
    def patches_folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "patches"
        folder.mkdir()
        header = "".join(f"{name}: because\n" for name in HEADER_FIELDS) + "\n"
        first = "--- a/a.py\n+++ b/a.py\n@@ -1 +1,2 @@\n a\n+first\n"
        second = (
            "--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,3 @@\n a\n first\n+second\n"
            "--- a/b.py\n+++ b/b.py\n@@ -1 +1 @@\n-b\n+B\n"
        )
        (folder / "1.patch").write_text(header + first)
        (folder / "2.patch").write_text(header + second)
        (folder / "index.toml").write_text(
            '[[releases]]\ntag = "t"\nversions = ["0.19.2"]\npatches = ["1.patch", "2.patch"]\n'
        )
        return folder

    @pytest.fixture
    def root(self, checkout: Path) -> Path:
        (checkout / "a.py").write_text("a\n")
        (checkout / "b.py").write_text("b\n")
        return checkout

    def test_both_and_back(self, root: Path, patches_folder: Path) -> None:
        before = tree(root)
        report = patching.apply(root, patches_folder=patches_folder)
        assert report.changed == ("a.py", "b.py")
        assert [(file.path, file.patches) for file in report.files] == [
            ("a.py", ("1.patch", "2.patch")),
            ("b.py", ("2.patch",)),
        ]
        assert ((root / "a.py").read_text(), (root / "b.py").read_text()) == ("a\nfirst\nsecond\n", "B\n")
        patching.revert(root, patches_folder=patches_folder)
        assert tree(root) == before

    @pytest.mark.parametrize("action, end", [(patching.apply, "patched"), (patching.revert, "unpatched")])
    def test_partial_state_is_completed(
        self, root: Path, patches_folder: Path, action: Callable[..., patching.Report], end: str
    ) -> None:
        (root / "b.py").write_text("B\n")
        assert patching.inspect(root, patches_folder=patches_folder).state == "partial"
        assert action(root, patches_folder=patches_folder).state == end

    def test_one_conflict_stops_all(self, root: Path, patches_folder: Path) -> None:
        (root / "b.py").write_text("other\n")
        with pytest.raises(ValueError, match=r"b.py is neither"):
            patching.apply(root, patches_folder=patches_folder)
        assert (root / "a.py").read_text() == "a\n"

    @pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt()])
    @pytest.mark.parametrize("failing_call", [1, 2])
    def test_failure_while_writing_restores_everything(
        self,
        root: Path,
        patches_folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        failing_call: int,
        error: BaseException,
    ) -> None:
        calls = 0
        real_replace = os.replace

        def failing_replace(source: Path, target: Path) -> None:
            nonlocal calls
            calls += 1
            if calls == failing_call:
                raise error
            real_replace(source, target)

        before = tree(root)
        times = {name: (root / name).stat().st_mtime_ns for name in ("a.py", "b.py")}
        monkeypatch.setattr(os, "replace", failing_replace)
        with pytest.raises(type(error)):
            patching.apply(root, patches_folder=patches_folder)
        assert calls > failing_call  # the roll-back went through it too
        assert tree(root) == before  # and no temporary file is left
        assert {name: (root / name).stat().st_mtime_ns for name in times} == times

    def test_failure_before_writing_changes_nothing(
        self, root: Path, patches_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        before = tree(root)
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            patching.apply(root, patches_folder=patches_folder)
        assert tree(root) == before
