"""What a run tells: progress on the console, TensorBoard and metrics.jsonl; on rank 0 alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hydrazero.trainer.distributed import rank
from hydrazero.trainer.run_files import MetricsWriter

TENSORBOARD = "tensorboard"
ROOM = 1_000_000
"""Bytes that a disk must have for TensorBoard, which writes in a thread that would die with a traceback."""


def shown(value: float | None, digits: int = 1) -> str:
    """Format a number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def left_out(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Say of each task how many structures an evaluation has left out, if any."""
    return [
        f"{name}: {row['unseen']} structures left out, with elements that no training structure of the task holds"
        for name, row in tasks.items()
        if row.get("unseen")
    ]


def progress_bar(label: str, total: int | None) -> tuple[Progress, Callable[[int], None]]:
    """Return a progress bar on stderr (a context manager) and the function that moves it."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    bar = progress.add_task("", total=total)
    return progress, lambda count: progress.update(bar, advance=count)


class RunLog:
    """Log of a run; every rank has one, only rank 0's writes."""

    def __init__(self, run_dir: Path, total_steps: int, start: int) -> None:
        self.run_dir, self.total_steps, self.start = run_dir, total_steps, start
        self.console = Console(stderr=True)
        self._progress: Progress | None = None
        self._metrics = MetricsWriter(run_dir)
        self._full = False

    def __enter__(self) -> RunLog:
        if rank() != 0:
            return self
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.run_dir / TENSORBOARD), purge_step=self.start + 1)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=2,
        )
        self._bar = self._progress.add_task("", total=self.total_steps, completed=self.start, rate="", loss="")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._writer.close()
            self._progress = None

    def say(self, sentence: str) -> None:
        """Show one line above the progress bar."""
        if self._progress is not None:
            self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int, loss: float) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, loss=f"{loss:.4f}")

    def _row(self, row: dict[str, Any]) -> bool:
        """Write a row to metrics.jsonl; returns whether there is room for TensorBoard too. A full disk is said once."""
        reason = self._metrics.append(row)
        if reason is not None and not self._full:
            self.say(f"warning: metrics.jsonl cannot be written ({reason}); its lines wait until it can.")
        self._full = reason is not None
        return not self._full and shutil.disk_usage(self.run_dir).free > ROOM

    def train_row(self, row: dict[str, Any]) -> None:
        """Log an interval of training."""
        if self._progress is None:
            return
        rate = f"{row['structures_per_s']:.0f} structures/s, waits {100 * row['data_wait_share']:.0f}%,"
        self._progress.update(self._bar, rate=rate)
        if not self._row({"kind": "train", **row}):
            return
        for name in ("loss", "learning_rate", "gradient_norm", "structures_per_s", "atoms_per_s", "data_wait_share"):
            if row[name] is not None:
                self._writer.add_scalar(f"train/{name}", row[name], row["step"])
        self._add_tasks("train", row["step"], row["tasks"])

    def balance_row(self, row: dict[str, Any]) -> None:
        """Log what was measured of the tasks' gradients, and the weights that follow."""
        if self._progress is None:
            return
        if not self._row({"kind": "balance", **row}):
            return
        for key in ("gradient_norms", "weights"):
            for name, value in row[key].items():
                if value is not None:
                    self._writer.add_scalar(f"{key}/{name}", value, row["step"])

    def evaluation_row(self, step: int, split: str, tasks: dict[str, dict[str, Any]], loss: float | None) -> None:
        """Log an evaluation, with the loss by which evaluations are compared, and show it as a table."""
        if self._progress is None:
            return
        facts = {"kind": "evaluation", "split": split, "step": step, "loss": loss}
        if self._row({**facts, "tasks": tasks}):
            if loss is not None:
                self._writer.add_scalar(f"{split}/loss", loss, step)
            self._add_tasks(split, step, tasks)
        table = Table(title=f"step {step}, {split}", title_justify="left")
        targets = sorted({target for row in tasks.values() for target in row["target_mae"]})
        stress = any(row["stress_mae_mev_per_angstrom3"] is not None for row in tasks.values())
        headings = ["task", "structures", "energy MAE meV/atom", "force MAE meV/Å"]
        for heading in [*headings, *(["stress MAE meV/Å³"] if stress else []), *(f"{name} MAE" for name in targets)]:
            table.add_column(heading, justify="left" if heading == "task" else "right")
        for name, row in tasks.items():
            energy, force = row["energy_mae_mev_per_atom"], row["force_mae_mev_per_angstrom"]
            rest = [shown(row["stress_mae_mev_per_angstrom3"], 3)] if stress else []
            rest += [shown(row["target_mae"].get(target), 4) for target in targets]
            table.add_row(name, str(row["structures"]), shown(energy, 2), shown(force), *rest)
        self.console.print(table)
        for sentence in left_out(tasks):
            self.say(sentence)

    def _add_tasks(self, prefix: str, step: int, tasks: dict[str, dict[str, Any]]) -> None:
        for name, row in tasks.items():
            targets = {f"{target}_mae": value for target, value in row["target_mae"].items()}
            for key, value in {**row, **targets}.items():
                if value is not None and key not in ("structures", "unseen", "target_mae"):
                    self._writer.add_scalar(f"{prefix}/{key}/{name}", value, step)
        self._writer.flush()
