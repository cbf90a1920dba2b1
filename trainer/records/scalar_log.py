"""Metrics and figures of a run in TensorBoard, and in Weights & Biases where the run file names a project."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.records.run_record import read_record

TENSORBOARD = "tensorboard"
SCORE = "val/loss"
"""Metric by which TensorBoard's table of hyperparameters compares runs."""


Settings = dict[str, float | str]
"""The settings of a run by 'section.key', those of tasks by 'tasks.NAME.key'."""


def hyperparameters(run_file: Mapping[str, Any]) -> Settings:
    """Return the settings of a run file's tables as one flat table."""
    flat: Settings = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                add(f"{prefix}.{key}" if prefix else key, one)
        elif value is not None:
            flat[prefix] = value if isinstance(value, int | float | str) else ", ".join(map(str, value))

    for section, table in run_file.items():
        if section == "tasks":
            for task in table:
                add(f"tasks.{task['name']}", {key: value for key, value in task.items() if key != "name"})
        else:
            add(section, table)
    return flat


class ScalarLog:
    """Writer of metrics and figures; only one rank has it."""

    def __init__(self, run_dir: Path, settings: Settings, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        project = str(settings.get("run.wandb", ""))
        self._wandb = WandbRun(run_dir, project, settings) if project else None
        self._writer: Any = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=start + 1)
        # Not add_hparams, which would show them as a second run, in a folder of its own.
        events: Any = self._writer.file_writer
        for summary in hparams(settings, {SCORE: None}):
            events.add_summary(summary)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log numbers by their tags; None is left out."""
        known = {tag: value for tag, value in values.items() if value is not None}
        for tag, value in known.items():
            self._writer.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._wandb.log(step, known)

    def add_pictures(self, step: int, figures: Mapping[str, Figure]) -> None:
        """Log figures by their tags."""
        images = {tag: pixels(figure) for tag, figure in figures.items()}
        for tag, image in images.items():
            self._writer.add_image(tag, image, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log_images(step, images)

    def flush(self) -> None:
        """Write everything logged so far to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """End the log."""
        self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as an image, [height, width, 3] uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def check_wandb(project: str) -> None:
    """Raise ConfigError if there is a project of Weights & Biases to log to, and the package wandb is absent."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"run.wandb = '{project}', but the package wandb is not installed; install it "
            "(pip install 'hydrazero[wandb]'), or leave run.wandb out."
        )


class WandbRun:
    """A run of Weights & Biases, which a resumed run continues."""

    def __init__(self, run_dir: Path, project: str, settings: Settings) -> None:
        """Start or continue the run; raises ConfigError if that fails."""
        self._package: Any = importlib.import_module("wandb")
        # The folder's name alone could be that of another run of the project.
        name = f"{run_dir.name}-{read_record(run_dir)['started']}"
        try:
            self._run = self._package.init(
                project=project,
                name=run_dir.name,
                id="".join(c if c.isalnum() or c in "-_" else "-" for c in name),
                resume="allow",
                dir=str(run_dir),
                config=settings,
            )
        except Exception as error:  # its errors depend on its version: no login, no network, an invalid name
            raise ConfigError(
                f"Weights & Biases could not be started ({' '.join(str(error).split())}); log in with 'wandb login', "
                "set WANDB_MODE=offline, or leave run.wandb out."
            ) from error
        # Numbers of its own would have to grow, and a resumed run does some steps again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by their tags."""
        self._run.log({**values, "step": step})

    def log_images(self, step: int, images: Mapping[str, NDArray[np.uint8]]) -> None:
        """Log images by their tags."""
        self._run.log({**{tag: self._package.Image(image) for tag, image in images.items()}, "step": step})

    def finish(self) -> None:
        """End the run."""
        self._run.finish()
