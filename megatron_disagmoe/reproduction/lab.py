"""Runs systems on cells (model, length, ...) and remembers what came out; several cells at once on several cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.reproduction.constants import Constants
from megatron_disagmoe.reproduction.hardware import calibrate
from megatron_disagmoe.reproduction.systems.af_paper import Shape
from megatron_disagmoe.reproduction.systems.af_search import best_paper, least_paper
from megatron_disagmoe.reproduction.systems.catalogue import AF_PIPE, baseline
from megatron_disagmoe.reproduction.systems.choose import Task, best
from megatron_disagmoe.reproduction.systems.result import Result

#: More processes than this bring little.
_MOST_PROCESSES = 8


@dataclass(frozen=True)
class Cell:
    """One system on one model at one length. ``top_k`` 0: the model's own; ``bytes_per_parameter`` 0: the constants'.

    ``shapes``: what AF-pipe may choose from, everything where empty; ``keep``: how many of them get schedules.
    """

    system: str
    model: str
    sequence: int
    top_k: int = 0
    bytes_per_parameter: int = 0
    shapes: tuple[Shape, ...] = ()
    keep: int = 8


def with_top_k(model: ModelSpec, top_k: int) -> ModelSpec:
    """The same with another number of experts a token; 0 leaves it."""
    if not top_k:
        return model
    return model.model_copy(update={"moe": model.moe.model_copy(update={"top_k": top_k})})


def task_of(cell: Cell, constants: Constants) -> Task:
    """The cell on the calibrated cluster."""
    cluster = calibrate(constants).cluster()
    if cell.bytes_per_parameter:
        constants = replace(constants, bytes_per_parameter=cell.bytes_per_parameter)
    return Task.usual(with_top_k(load_model(cell.model), cell.top_k), cluster, cell.sequence, constants)


def run_cell(cell: Cell, constants: Constants, *, at_bound: bool = False) -> Result | None:
    """The system at its best; None where nothing fits. ``at_bound``: AF-pipe at its lowest bound instead.

    Raises:
        ValueError: there is no such system.
    """
    task = task_of(cell, constants)
    if cell.system == AF_PIPE and at_bound:
        return least_paper(task, possible=cell.shapes or None)
    if cell.system == AF_PIPE:
        return best_paper(task, possible=cell.shapes or None, keep=cell.keep)
    return best(baseline(cell.system, constants), task)


@dataclass
class Lab:
    """Results by cell. ``processes``: how many cells run at once; 1 stays in this process. ``at_bound``: see above."""

    constants: Constants = field(default_factory=Constants)
    processes: int = 1
    results: dict[Cell, Result | None] = field(default_factory=dict)
    at_bound: bool = False

    @classmethod
    def on_all_cores(cls, constants: Constants | None = None) -> Lab:
        """As many processes as there are cores for this one."""
        cores = len(os.sched_getaffinity(0))
        return cls(constants or Constants(), min(cores, _MOST_PROCESSES))

    def run(self, cells: Sequence[Cell]) -> None:
        """Compute what isn't known yet; those that take longest (AF-pipe) first."""
        missing = [cell for cell in dict.fromkeys(cells) if cell not in self.results]
        missing.sort(key=lambda cell: cell.system != AF_PIPE)
        if self.processes == 1 or len(missing) < 2:
            for cell in missing:
                self.results[cell] = run_cell(cell, self.constants, at_bound=self.at_bound)
            return
        with ProcessPoolExecutor(min(self.processes, len(missing))) as pool:
            futures = [pool.submit(run_cell, cell, self.constants, at_bound=self.at_bound) for cell in missing]
            for cell, future in zip(missing, futures, strict=True):
                self.results[cell] = future.result()

    def __getitem__(self, cell: Cell) -> Result | None:
        self.run([cell])
        return self.results[cell]
