"""Replace several files so that either all are new or all are what they were."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path


def replace_all(root: Path, contents: Mapping[str, bytes]) -> None:
    """Give every file of ``contents`` (bytes by path below ``root``) its new content, keeping permissions.

    Everything that can fail for lack of space or permission is done beforehand, beside the files; then they are
    renamed into place one by one. Whatever interrupts that (short of a kill) puts the replaced ones back.
    """
    files = {(root / path).resolve(): content for path, content in contents.items()}
    with contextlib.ExitStack() as stack:
        new = {file: stack.enter_context(_beside(file, content)) for file, content in files.items()}
        old = {file: stack.enter_context(_beside(file)) for file in files}
        replaced: list[Path] = []
        try:
            for file in files:
                replaced.append(file)
                os.replace(new[file], file)
        except BaseException:
            for file in replaced:
                os.replace(old[file], file)
            raise


@contextlib.contextmanager
def _beside(file: Path, content: bytes | None = None) -> Iterator[Path]:
    """A file in the same folder with ``content``, or a copy of ``file`` in all respects; removed if still there."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".disagmoe", dir=file.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(file.read_bytes() if content is None else content)
            stream.flush()
            os.fsync(stream.fileno())
        (shutil.copymode if content is not None else shutil.copystat)(file, temporary)
        owner = file.stat()
        with contextlib.suppress(PermissionError):  # only root may give files away
            os.chown(temporary, owner.st_uid, owner.st_gid)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
