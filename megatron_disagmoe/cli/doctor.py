"""``disagmoe doctor``: what this machine can run, and what is missing for the rest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, emit

app = typer.Typer(help="Say what this machine can run.")

GIB = 2**30
#: The quickstart's four ranks and its driver, at about 0.8 GiB each.
_MEMORY_WANTED = 5 * GIB
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
#: Lays out, in a network namespace that ends with the command, the shaped link that ``bench shaped`` needs.
_SHAPED_LINK = (
    "ip link add doctor0 type veth peer name doctor1 && "
    "tc qdisc add dev doctor0 root tbf rate 100mbit burst 64kb latency 2s"
)


@dataclass(frozen=True)
class Check:
    """One row. Training on a CPU works only where every ``required`` check is ``ok``; the others enable more."""

    name: str
    ok: bool
    detail: str
    required: bool = False


@app.command()
def doctor(as_json: bool = JsonOption) -> None:
    """Check Python, PyTorch, Megatron, devices, transports and this machine. Exit code 1 if training cannot run."""
    checks = [row for check in CHECKS for row in check()]
    emit({"checks": [asdict(row) for row in checks]}, as_json=as_json, render=lambda console: _render(console, checks))
    if any(row.required and not row.ok for row in checks):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def _python() -> Iterator[Check]:
    yield Check("python", sys.version_info >= (3, 12), f"{platform.python_version()}, {sys.executable}", required=True)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check("torch", False, f"{error}: pip install torch==2.13.0", required=True)
        return
    tested = torch.__version__.split("+")[0].split(".")[:2] == ["2", "13"]
    yield Check("torch", tested, torch.__version__ + ("" if tested else "; tested with 2.13"), required=True)
    has_distributed = torch.distributed.is_available()
    gloo = has_distributed and torch.distributed.is_gloo_available()
    yield Check("gloo", gloo, "processes on CPUs" if gloo else "this PyTorch was built without it", required=True)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Check("cuda", True, f"{len(names)} devices: {', '.join(sorted(set(names)))}; CUDA {torch.version.cuda}")
    else:
        yield Check("cuda", False, "no device: Megatron runs on the CPU, with flags that the launcher sets")


def _megatron() -> Iterator[Check]:
    try:
        from megatron_disagmoe import megatron_seams
    except ImportError as error:  # torch is missing, which its own row says
        yield Check("megatron", False, str(error), required=True)
        return
    try:
        with _quiet():
            found = megatron_seams.check_version()
    except ValueError as error:
        yield Check("megatron", False, str(error), required=True)
        return
    yield Check("megatron", True, f"{found.version} at {found.root}", required=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Megatron warns of on import: each missing package it could use has a row of ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _optional_packages() -> Iterator[Check]:
    for name, distribution, extra, use in (
        ("transformer-engine", "transformer-engine", "gpu", "Megatron's fused modules on GPUs"),
        ("nixl", "nixl", "nixl", "--af-transport nixl"),
    ):
        try:
            yield Check(name, True, f"{importlib.metadata.version(distribution)}, for {use}")
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, f"for {use}: pip install -e '.[{extra}]'")


def _cores() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("cores", cores >= 2, f"{cores} usable" + ("" if cores >= 2 else "; attention and experts take turns"))


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    limit = memory.total
    if _CGROUP_LIMIT.is_file() and (text := _CGROUP_LIMIT.read_text().strip()).isdigit():
        limit = min(limit, int(text))
    available = min(memory.available, limit)
    detail = f"{available / GIB:.1f} GiB available of {limit / GIB:.1f}; the quickstart wants {_MEMORY_WANTED // GIB}"
    yield Check("memory", available >= _MEMORY_WANTED, detail)


def _namespaces() -> Iterator[Check]:
    """Whether two hosts with a slow link between them can be laid out here, by laying out one."""
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if missing:
        yield Check("namespaces", False, f"{', '.join(missing)} not found (Debian: iproute2, util-linux)")
        return
    if os.geteuid() != 0:
        yield Check("namespaces", False, "needs root, for shaped links (bench shaped)")
        return
    tried = subprocess.run(
        ["unshare", "--net", "sh", "-c", _SHAPED_LINK], capture_output=True, text=True, timeout=30, check=False
    )
    ok = tried.returncode == 0
    yield Check("namespaces", ok, "root, ip and tc: shaped links work" if ok else tried.stderr.strip())


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _python,
    _torch,
    _megatron,
    _optional_packages,
    _cores,
    _memory,
    _namespaces,
)


def _render(console: Console, checks: list[Check]) -> None:
    table = Table("", "check", "detail", box=None, pad_edge=False)
    for row in checks:
        mark = "[green]ok[/]" if row.ok else "[red]missing[/]" if row.required else "[yellow]no[/]"
        table.add_row(mark, row.name, Text(row.detail))
    console.print(table)
