"""Where the files lie that we ship beside the code: ``configs/`` and ``patches/``.

In a checkout they are folders beside the package; an installed wheel has them inside it (setup.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: Literal["configs", "patches"]) -> Path:
    """The folder ``name`` of this installation.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for folder in (_PACKAGE / name, _PACKAGE.parent / name):
        if (folder / "__init__.py").is_file():
            return folder
    raise FileNotFoundError(f"megatron_disagmoe at {_PACKAGE} lacks its '{name}' folder: install it again")
