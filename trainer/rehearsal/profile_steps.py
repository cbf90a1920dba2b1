"""A profile of training steps: a trace for each rank, and a table of the most expensive operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from hydrazero.shards.device import device_kind, has_gpu
from hydrazero.shards.files import replacing
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.evaluation.interval import Interval
from hydrazero.trainer.loop import Trainer
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.progress_line import wide_console
from hydrazero.trainer.records.run_log import SilentLog
from hydrazero.trainer.setup import CheckedRun, compile_steps, engine_of, run_parts, weight_average_of

WARM_UP, PROFILED = 5, 5
"""Numbers of steps before and in the profile; the first ones compile, allocate memory and fill caches."""
SHOWN = 10
NAME_WIDTH = 60
FOLDER = "profile"


def profile_steps(config: RunConfig, checked: CheckedRun) -> None:
    """Profile some steps, write RUN/profile/trace-rankN.json, and print the most expensive operations."""
    # This gives generated kernels names of their own; without it, a compiled step is a single operation.
    torch._inductor.config.cpp.enable_kernel_profile = True
    engine = engine_of(config, checked)
    # The balance decides whether a step computes the gradients of tasks, before the step is compiled.
    average = weight_average_of(engine, config.train.average)
    parts = run_parts(config, checked, engine, average, stop=StopRequest(0.0), log=SilentLog())
    run_dir = Path(config.run.out)
    trainer = Trainer(run_dir, config.train, parts)
    console = wide_console(stderr=True)
    if config.train.compile:
        sentence = compile_steps(engine)
        if distributed.rank() == 0:
            console.print(sentence, highlight=False, soft_wrap=True)
    batches, interval = iter(trainer.parts.stream), Interval()
    engine.train()
    for _ in range(WARM_UP):
        trainer.one_step(batches, interval)
    activities = [ProfilerActivity.CPU, *([getattr(ProfilerActivity, device_kind().upper())] if has_gpu() else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            trainer.one_step(batches, interval)
    path = _write_trace(profiler, run_dir / FOLDER)
    distributed.wait_for_all()
    if distributed.rank() == 0:
        output = wide_console(stderr=False)
        output.print(_table(profiler.key_averages(), steps=PROFILED))
        others = "" if distributed.ranks() == 1 else f", and one for each of the {distributed.ranks()} ranks"
        output.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB{others}", highlight=False, soft_wrap=True)


def _write_trace(profiler: Any, folder: Path) -> Path:
    """Write this rank's trace to a temporary file and rename it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trace-rank{distributed.rank()}.json"
    with replacing(path, shared=True) as part:
        profiler.export_chrome_trace(str(part))
    return path


def _table(events: Any, *, steps: int) -> Table:
    """Return the table of operations that take most time, without that of the operations that they call."""
    gpu = has_gpu()
    times = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    total = sum(times.values()) or 1.0
    device = "GPU" if gpu else "CPU"
    title = f"the {SHOWN} most expensive operations of {steps} steps on rank 0, by their own time on the {device}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("operation", no_wrap=True, max_width=NAME_WIDTH)
    for heading in ("calls\na step", "CPU ms\na step", *(["GPU ms\na step"] if gpu else []), "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for event in sorted(events, key=lambda event: times[event.key], reverse=True)[:SHOWN]:
        spent = [event.self_cpu_time_total, *([event.self_device_time_total] if gpu else [])]
        table.add_row(
            event.key,
            f"{event.count / steps:g}",
            *(f"{time / 1000 / steps:.2f}" for time in spent),
            f"{100 * times[event.key] / total:.1f}%",
        )
    return table
