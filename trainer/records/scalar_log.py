"""Numbers and pictures of a run over its steps: into TensorBoard, and into Weights & Biases where that is asked for."""

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
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.records.run_record import read_record

TENSORBOARD = "tensorboard"
SCORE = "val/loss"
"""What runs are compared by in TensorBoard's table of hyperparameters."""


def hyperparameters(config: RunConfig) -> dict[str, float | str]:
    """Return a run's configuration as one flat table, 'section.key' -> number or text; tasks by their names."""
    flat: dict[str, float | str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                add(f"{prefix}.{key}" if prefix else key, one)
        elif value is not None:
            flat[prefix] = value if isinstance(value, int | float | str) else ", ".join(map(str, value))

    document = config.model_dump()
    tasks = document.pop("tasks")
    add("", document)
    for task in tasks:
        add(f"tasks.{task.pop('name')}", task)
    return flat


class ScalarLog:
    """Where numbers and pictures go; used on one rank alone."""

    def __init__(self, run_dir: Path, config: RunConfig, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._wandb = WandbRun(run_dir, config) if config.run.wandb else None
        self._writer: Any = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=start + 1)
        # Not add_hparams, which would show them as a second run, in a folder of its own.
        events: Any = self._writer.file_writer
        for summary in hparams(hyperparameters(config), {SCORE: None}):
            events.add_summary(summary)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log numbers by their tags; those that are not known are left out."""
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
        """Let what was logged be seen."""
        self._writer.flush()

    def close(self) -> None:
        """End the log."""
        self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Draw a figure: [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def check_wandb(config: RunConfig) -> None:
    """Raise ConfigError if a run shall be logged to Weights & Biases, and its package is absent."""
    if config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"run.wandb = '{config.run.wandb}', but the package wandb is not installed; install it "
            "(pip install 'hydrazero[wandb]'), or leave run.wandb out."
        )


class WandbRun:
    """A run of Weights & Biases, gone on with when the run is resumed."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        """Start or go on; raises ConfigError if it cannot be."""
        self._package: Any = importlib.import_module("wandb")
        # The folder's name alone could be that of another run of the project.
        name = f"{run_dir.name}-{read_record(run_dir)['started']}"
        try:
            self._run = self._package.init(
                project=config.run.wandb,
                name=run_dir.name,
                id="".join(c if c.isalnum() or c in "-_" else "-" for c in name),
                resume="allow",
                dir=str(run_dir),
                config=hyperparameters(config),
            )
        except Exception as error:  # what it fails with depends on its version: no login, no network, a refused name
            raise ConfigError(
                f"Weights & Biases could not be started ({' '.join(str(error).split())}); log in with 'wandb login', "
                "set WANDB_MODE=offline, or leave run.wandb out."
            ) from error
        # Numbers of its own would have to grow, and a resumed run does some steps again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers."""
        self._run.log({**values, "step": step})

    def log_images(self, step: int, images: Mapping[str, NDArray[np.uint8]]) -> None:
        """Log pictures."""
        self._run.log({**{tag: self._package.Image(image) for tag, image in images.items()}, "step": step})

    def finish(self) -> None:
        """End the run."""
        self._run.finish()
