"""The patches we ship and the versions of Megatron Core they are for (``patches/index.toml``)."""

from __future__ import annotations

import email.parser
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.files import shipped_folder

HEADER_FIELDS = ("Reason", "Symbol", "Guard", "Test", "Until")
"""What every patch says of itself above its diff, as in the header of a mail."""

_OLD_PATH = re.compile(r"^--- a/(.+)$", re.MULTILINE)
_NEW_PATH = re.compile(r"^\+\+\+ b/(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Patch:
    """One patch file: its name below ``patches/``, its header, its whole text and the files it changes."""

    name: str
    header: dict[str, str]
    text: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Release:
    """The patches of one upstream release, in order of application; ``versions`` as ``package_info.py`` has them."""

    tag: str
    versions: tuple[str, ...]
    patches: tuple[Patch, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file that a patch changes, sorted."""
        return tuple(sorted({path for patch in self.patches for path in patch.paths}))


def releases(folder: Path | None = None) -> tuple[Release, ...]:
    """All releases of the index in ``folder`` (default: ours).

    Raises:
        ValueError: a patch lacks a header field, or does anything but change existing files.
    """
    folder = folder or shipped_folder("patches")
    table = tomllib.loads((folder / "index.toml").read_text(encoding="utf-8"))
    return tuple(
        Release(
            tag=entry["tag"],
            versions=tuple(entry["versions"]),
            patches=tuple(_read(folder, name) for name in entry["patches"]),
        )
        for entry in table["releases"]
    )


def _read(folder: Path, name: str) -> Patch:
    text = (folder / name).read_text(encoding="utf-8")
    header = {key: " ".join(value.split()) for key, value in email.parser.HeaderParser().parsestr(text).items()}
    missing = [field for field in HEADER_FIELDS if not header.get(field)]
    if missing:
        raise ValueError(f"patch {name} has no {', '.join(missing)} in its header")
    paths = tuple(_OLD_PATH.findall(text))
    if not paths or paths != tuple(_NEW_PATH.findall(text)):
        raise ValueError(f"patch {name} must change existing files, and neither make, move nor delete one")
    return Patch(name=name, header=header, text=text, paths=paths)
