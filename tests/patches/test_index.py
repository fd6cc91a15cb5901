"""What is shipped in ``patches/``: every patch explains itself, and every file belongs to a release."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_disagmoe.files import shipped_folder
from megatron_disagmoe.patching import index

ROOT = Path(__file__).parents[2]


def patches() -> list[index.Patch]:
    return [patch for release in index.releases() for patch in release.patches]


def test_tag_and_wheel_are_known() -> None:
    (release,) = index.releases()
    # Tag core_v0.19.0 calls itself 0.19.1 in package_info.py, the wheel 0.19.2.
    assert (release.tag, release.versions) == ("core_v0.19.0", ("0.19.1", "0.19.2"))


def test_every_patch_file_belongs_to_a_release() -> None:
    folder = shipped_folder("patches")
    files = {str(file.relative_to(folder)) for file in folder.rglob("*.patch")}
    assert files == {patch.name for patch in patches()} != set()


def test_every_patch_names_a_test_that_exists() -> None:
    for patch in patches():
        assert (ROOT / patch.header["Test"]).is_file(), patch.name


def test_every_patch_is_in_the_ledger() -> None:
    ledger = (ROOT / "docs" / "patches.md").read_text()
    for patch in patches():
        assert Path(patch.name).name in ledger


def test_diffs_hold_few_lines_that_are_megatrons() -> None:
    for patch in patches():
        body = patch.text[patch.text.index("\n@@") :].splitlines()
        context = [line for line in body if line.startswith((" ", "-"))]
        assert len(context) <= 6, f"{patch.name} carries {len(context)} lines of Megatron"


@pytest.mark.parametrize("field", index.HEADER_FIELDS)
def test_patch_without_a_header_field_is_refused(tmp_path: Path, field: str) -> None:
    header = "".join(f"{name}: because\n" for name in index.HEADER_FIELDS if name != field)
    write_index(tmp_path, header + "\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-old\n+new\n")
    with pytest.raises(ValueError, match=f"one.patch has no {field} in its header"):
        index.releases(tmp_path)


@pytest.mark.parametrize("names", ["--- /dev/null\n+++ b/f\n", "--- a/f\n+++ /dev/null\n", "--- a/f\n+++ b/g\n", ""])
def test_patch_that_makes_moves_or_deletes_a_file_is_refused(tmp_path: Path, names: str) -> None:
    header = "".join(f"{name}: because\n" for name in index.HEADER_FIELDS)
    write_index(tmp_path, header + f"\n{names}@@ -1 +1 @@\n-old\n+new\n")
    with pytest.raises(ValueError, match=r"one.patch must change existing files"):
        index.releases(tmp_path)


def write_index(folder: Path, patch: str) -> None:
    (folder / "index.toml").write_text('[[releases]]\ntag = "t"\nversions = ["0.19.2"]\npatches = ["one.patch"]\n')
    (folder / "one.patch").write_text(patch)
