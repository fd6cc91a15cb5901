"""Which folders become packages; everything else about the project stands in pyproject.toml.

``configs`` and ``patches`` are read at run time, so they are installed, but below our own name: a
top-level ``configs`` or ``patches`` in site-packages would collide with other people's. ``scripts``,
``tests`` and ``docs`` belong to the checkout and the source distribution only.
See ``megatron_disagmoe/files.py`` for how either layout is found again.
"""

from __future__ import annotations

from setuptools import find_packages, setup

DATA_PACKAGES = {"megatron_disagmoe.configs": "configs", "megatron_disagmoe.patches": "patches"}

setup(
    packages=[*find_packages(include=["megatron_disagmoe", "megatron_disagmoe.*"]), *DATA_PACKAGES],
    package_dir=DATA_PACKAGES,
    package_data={
        **{package: ["*", "**/*"] for package in DATA_PACKAGES},
        "megatron_disagmoe.drawing": ["viewer.*"],  # the HTML page's own code
    },
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
)
