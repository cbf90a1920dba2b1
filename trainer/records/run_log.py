"""The log of a run: on the console, in metrics.jsonl, and in TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hydrazero.shards.text.terminal import PlainConsole
from hydrazero.trainer.records.progress_line import ProgressLine, wide_console
from hydrazero.trainer.records.run_files import MetricsWriter
from hydrazero.trainer.records.task_errors import TaskErrors, TaskEvaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hydrazero.trainer.records.scalar_log import Settings

TRAIN_SCALARS = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "structures_per_s",
    "atoms_per_s",
    "data_wait_share",
    "memory_mb",
    "skipped_steps",
)
"""Metrics of training that belong to no single task and are logged to TensorBoard."""
ROOM = 1_000_000
"""Bytes that must be free for TensorBoard, whose writing thread would otherwise fail with a traceback."""


def shown(value: float | None, digits: int = 1) -> str:
    """Return a number as text for a table, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def left_out(tasks: Mapping[str, TaskErrors | TaskEvaluation]) -> list[str]:
    """Return a sentence for each task of which an evaluation has left out structures."""
    return [
        f"{name}: {errors.unseen} structures left out, with elements that no training structure of the task contains"
        for name, errors in tasks.items()
        if errors.unseen
    ]


class ProgressBar(Progress):
    """A progress bar on stderr that is removed where an error ends the work, so that the error stands alone."""

    def __init__(self, *columns: ProgressColumn) -> None:
        super().__init__(*columns, console=PlainConsole(stderr=True))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop showing it."""
        if kind is not None:
            self.live.transient = True
            for row in self.task_ids:
                self.update(row, visible=False)
        super().__exit__(kind, error, at)


def progress_bar(label: str, total: int | None) -> tuple[Progress, Callable[[int], None]]:
    """Return a progress bar on stderr, which is a context manager, and the function that advances it."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = ProgressBar(*columns)
    bar = progress.add_task("", total=total)
    return progress, lambda count: progress.update(bar, advance=count)


class RunLog:
    """The log of a run. Every rank has one, but only that of rank 0 writes, and only inside its `with` block."""

    def __init__(self, run_dir: Path, steps: int, *, start: int = 0, settings: Settings | None = None) -> None:
        """Take the run folder, the number of steps, the step to start from, and the run's settings as one flat table.

        `settings` are logged as hyperparameters; `run.wandb` among them names the project of Weights & Biases.
        """
        self.run_dir, self.steps, self.start, self.settings = run_dir, steps, start, settings or {}
        self._line: ProgressLine | None = None
        self._metrics = MetricsWriter(self.run_dir)
        self._full = False

    def __enter__(self) -> RunLog:
        from hydrazero.trainer.ranks.distributed import rank, together  # it imports PyTorch, which reports do not need

        # An error on rank 0 is raised on all ranks.
        together(lambda: self._open() if rank() == 0 else None)
        return self

    def _open(self) -> None:
        from hydrazero.trainer.records.scalar_log import ScalarLog

        self._scalars = ScalarLog(self.run_dir, self.settings, self.start)
        self._line = ProgressLine(wide_console(stderr=True), self.start, self.steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.stop()
            self._scalars.close()
            self._line = None

    def say(self, sentence: str) -> None:
        """Print one line above the progress."""
        if self._line is not None:
            self._line.say(sentence)

    def advance(self, step: int, loss: float) -> None:
        """Advance the progress to a step."""
        if self._line is not None:
            self._line.advance(step, loss)

    def _row(self, row: dict[str, Any]) -> bool:
        """Write a row to metrics.jsonl, report a full disk once; return whether there is space for TensorBoard."""
        reason = self._metrics.append(row)
        if reason is not None and not self._full:
            self.say(f"warning: metrics.jsonl cannot be written ({reason}); its lines are kept in memory until it can.")
        self._full = reason is not None
        return self._there_is_room()

    def _there_is_room(self) -> bool:
        """Return whether there is space for TensorBoard."""
        return not self._full and shutil.disk_usage(self.run_dir).free > ROOM

    def train_row(self, row: dict[str, Any]) -> None:
        """Log a row about an interval of training."""
        if self._line is None:
            return
        there_is_room = self._row({"kind": "train", **row})
        self._line.interval(row["structures_per_s"], row["data_wait_share"])
        if not there_is_room:
            return
        values = {f"train/{name}": row[name] for name in TRAIN_SCALARS}
        for key in ("weights", "sampling_shares"):
            values |= {f"{key}/{task}": value for task, value in row[key].items()}
        self._scalars.add(row["step"], {**values, **by_task("train", _errors_in(row))})
        self._scalars.flush()

    def balance_row(self, row: dict[str, Any]) -> None:
        """Log a row about the gradients of the tasks."""
        if self._line is None:
            return
        if not self._row({"kind": "balance", **row}):
            return
        names = list(row["gradient_norms"])
        cosines = {
            f"cosines/{names[one]}-{names[other]}": row["cosines"][one][other]
            for one, other in combinations(range(len(names)), 2)
        }
        norms = {f"gradient_norms/{name}": value for name, value in row["gradient_norms"].items()}
        self._scalars.add(row["step"], {**norms, **cosines})

    def pictures(self, step: int, figures: Callable[[], dict[str, Figure]]) -> None:
        """Log figures by their tags; they are drawn only on the rank that logs them."""
        if self._line is not None and self._there_is_room():
            self._scalars.add_pictures(step, figures())
            self._scalars.flush()

    def evaluation_row(self, row: dict[str, Any]) -> None:
        """Log a row about an evaluation, and print its errors as a table."""
        if self._line is None:
            return
        step, split, tasks = row["step"], row["split"], _errors_in(row)
        if self._row({"kind": "evaluation", **row}):
            self._scalars.add(step, {f"{split}/loss": row["loss"], **by_task(split, tasks)})
            self._scalars.flush()
        table = Table(title=f"step {step}, {split}", title_justify="left")
        targets = sorted({target for errors in tasks.values() for target in errors.target_maes})
        stress = any(errors.stress_mae is not None for errors in tasks.values())
        headings = ["task", "structures", "energy MAE meV/atom", "force MAE meV/Å"]
        for heading in [*headings, *(["stress MAE meV/Å³"] if stress else []), *(f"{name} MAE" for name in targets)]:
            table.add_column(heading, justify="left" if heading == "task" else "right")
        for name, errors in tasks.items():
            rest = [shown(errors.stress_mae, 3)] if stress else []
            rest += [shown(errors.target_maes.get(target), 4) for target in targets]
            table.add_row(name, str(errors.structures), shown(errors.energy_mae, 2), shown(errors.force_mae), *rest)
        self._line.console.print(table)
        for sentence in left_out(tasks):
            self.say(sentence)


class SilentLog(RunLog):
    """A log that writes nothing and keeps its sentences."""

    def __init__(self) -> None:
        super().__init__(Path(), 0)
        self.sentences: list[str] = []

    def say(self, sentence: str) -> None:
        """Keep a sentence."""
        self.sentences.append(sentence)


def _errors_in(row: dict[str, Any]) -> dict[str, TaskErrors]:
    return {name: TaskErrors.from_json(errors) for name, errors in row["tasks"].items()}


def by_task(prefix: str, tasks: Mapping[str, TaskErrors]) -> dict[str, float | None]:
    """Return the losses and errors of tasks by their tags in TensorBoard, such as 'val/energy_loss/TASK'."""
    return {
        f"{prefix}/{key}/{name}": value for name, errors in tasks.items() for key, value in errors.scalars().items()
    }
