"""The time of training steps on this machine, measured without starting the run; `hydrazero init` uses it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hydrazero.shards.files import read_json, write_json
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.engine.zero_layout import full_size
from hydrazero.trainer.evaluation.interval import Interval
from hydrazero.trainer.loop import Trainer
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.run_log import SilentLog
from hydrazero.trainer.rehearsal.dry_run import validation_seconds
from hydrazero.trainer.setup import CheckedRun, compile_steps, engine_of, run_parts, weight_average_of

FILE_NAME = "step_times.json"
"""Name of the file in the run folder to which the first rank writes the times."""
WARM_UP = 3
"""Number of steps that are not measured: they allocate memory and fill the queues of the data workers."""
SECONDS = 4.0
"""Approximate duration of a measurement."""
FEWEST, MOST = 3, 30
"""Minimum and maximum number of steps in a measurement."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Times in seconds, those of the slowest rank."""

    eager: float
    """A training step that is not compiled, on average: some steps also measure the gradients of the tasks."""
    compiled: float | None
    """A compiled training step, on average; None if train.compile is not set, or if steps cannot be compiled."""
    compiling: float
    """First compiled steps, in which the compiler runs; 0 if steps are not compiled."""
    validation: float
    """One validation batch on each rank; 0 if there are no validation structures."""
    structures: float
    """Mean number of structures in a rank's batch."""
    parameters: int
    """Number of parameters of the model."""


def measure_steps(config: RunConfig, checked: CheckedRun) -> None:
    """Measure eager steps and, if train.compile is set, compiled ones; the first rank writes RUN/step_times.json."""
    engine = engine_of(config, checked)
    average = weight_average_of(engine, config.train.average)
    parts = run_parts(config, checked, engine, average, stop=StopRequest(0.0), log=SilentLog())
    trainer = Trainer(Path(config.run.out), config.train, parts)
    counted: list[float] = []
    batches = _counting(iter(trainer.parts.stream), counted)
    engine.train()
    plain = _seconds_per_step(trainer, batches)
    extra = _balance_factor(trainer, batches, plain)
    validation = distributed.max_over_ranks(distributed.together(lambda: validation_seconds(trainer)))
    compiled, compiling = None, 0.0
    if config.train.compile:
        compile_steps(engine)
        # Steps that measure gradients are another graph, which takes about as long to compile.
        compiling = _timed_step(trainer, batches) * (1 if extra == 1.0 else 2)
        if not engine.module.not_compiled:
            compiled = extra * _seconds_per_step(trainer, batches)
    times = StepTimes(
        eager=extra * plain,
        compiled=compiled,
        compiling=compiling,
        validation=validation,
        structures=sum(counted) / len(counted),
        parameters=sum(full_size(one) for one in engine.module.parameters()),
    )
    if distributed.rank() == 0:
        folder = Path(config.run.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE_NAME, asdict(times), shared=True)


def read_step_times(run_dir: Path) -> StepTimes:
    """Return the times that `measure_steps` has written."""
    return StepTimes(**read_json(run_dir / FILE_NAME, shape=StepTimes))


def _counting(batches: Iterator[GraphBatch], counted: list[float]) -> Iterator[GraphBatch]:
    """Yield batches and note their numbers of structures."""
    for batch in batches:
        counted.append(float(batch.structure_mask.sum()))
        yield batch


def _timed_step(trainer: Trainer, batches: Iterator[GraphBatch]) -> float:
    """Return the seconds of one step on the slowest rank."""
    began = time.monotonic()
    trainer.one_step(batches, Interval())
    return distributed.max_over_ranks(time.monotonic() - began)


def _balance_factor(trainer: Trainer, batches: Iterator[GraphBatch], plain: float) -> float:
    """Return the mean time of a step over that of one that does not measure the gradients of the tasks.

    The steps of the run start at 1 again afterwards, so that none of the next ones measures gradients.
    """
    every = trainer.parts.balance.every
    if every < 1:
        return 1.0
    seconds = plain
    for _ in range(2):  # the first one warms up
        trainer.step = every - 1
        seconds = _timed_step(trainer, batches)
    trainer.step = 0
    return (every - 1 + max(seconds / plain, 1.0)) / every


def _seconds_per_step(trainer: Trainer, batches: Iterator[GraphBatch]) -> float:
    """Return the mean seconds of a step after a few that warm up; the same on every rank."""
    last = 0.0
    for _ in range(WARM_UP):
        last = _timed_step(trainer, batches)
    count = min(max(round(SECONDS / max(last, 1e-6)), FEWEST), MOST)
    began = time.monotonic()
    for _ in range(count):
        trainer.one_step(batches, Interval())
    return distributed.max_over_ranks(time.monotonic() - began) / count
