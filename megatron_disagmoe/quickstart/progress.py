"""Progress of a training job: a bar on a terminal, now and then a line where there is none."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_disagmoe.quickstart.jobs import Job
from megatron_disagmoe.training_log import Step, Validation

#: Where output is no terminal, one line each so many steps.
LINE_EVERY = 20


class StepProgress:
    """Shows the records of one job as they come; a context manager, since a bar must be closed."""

    def __init__(self, job: Job, *, steps: int, console: Console) -> None:
        self._job, self._steps, self._console = job, steps, console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(f"{job.title}: starting", total=steps, loss="")

    def __enter__(self) -> StepProgress:
        processes = f"{self._job.processes} process{'es' if self._job.processes > 1 else ''}"
        self._say(f"Training with {self._job.title} on {processes}; starting them takes a while")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, record: Step | Validation | None) -> None:
        """Show one record; ``None`` (a line without one) changes nothing."""
        if isinstance(record, Step):
            self._bar.update(
                self._task, description=self._job.title, completed=record.iteration, loss=f"loss {_loss(record)}"
            )
            if not self._console.is_terminal and (record.iteration == 1 or record.iteration % LINE_EVERY == 0):
                self._say(
                    f"  step {record.iteration:4d}/{self._steps}  loss {_loss(record)}  {record.seconds:.2f} s a step"
                )
        elif record is not None and record.split is None:
            self._say(f"  validation loss after step {record.iteration}: {record.loss:.4f}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False)


def _loss(step: Step) -> str:
    return "skipped" if step.loss is None else f"{step.loss:.4f}"
