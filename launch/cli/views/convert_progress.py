"""The progress and the summary of a conversion on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hydrazero.launch.cli.views.task_notes import task_notes
from hydrazero.shards.convert.convert import Progress as Place
from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.convert.workers import worker_processes
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.text.foreign_text import echo
from hydrazero.trainer.records.run_log import ProgressBar


def convert_with_progress(
    sources: Sequence[Path],
    task: str,
    out: Path,
    settings: ConvertSettings,
    *,
    workers: int,
    skip_bad: bool,
    trust_pickle: bool,
) -> None:
    """Convert with a progress bar and print a summary.

    Under mpirun, all ranks but the first return when the work is done. Raises what `convert` and `worker_processes`
    raise.
    """
    with worker_processes(workers) as team:
        if team is None:
            return
        columns = (
            TextColumn("{task.description:8}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        with ProgressBar(*columns) as bar:
            watch = _Watch(bar)
            manifest = convert(
                sources,
                task,
                out,
                settings,
                workers=team,
                skip_bad=skip_bad,
                trust_pickle=trust_pickle,
                progress=watch,
            )
            watch.end()
    _print_summary(manifest, out, settings)


class _Watch:
    """Updates a progress bar for each part of the conversion, with its rate and the remaining time."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.part = ""
        self.row: TaskID | None = None
        self.started, self.first = monotonic(), 0.0

    def end(self) -> None:
        """Show the last part as complete."""
        if self.row is not None:
            self.bar.update(self.row, completed=1.0, rate=self.bar.tasks[-1].fields["rate"].partition(",")[0])

    def __call__(self, place: Place) -> None:
        if place.part != self.part:
            self.end()
            self.part, self.row = place.part, self.bar.add_task(place.part, total=1.0, rate="")
            # What an earlier start has done says nothing about the speed of this one.
            self.started, self.first = monotonic(), place.fraction
        seconds = max(monotonic() - self.started, 1e-6)
        words = []
        if place.frames:
            words.append(f"{place.frames:,} frames at {place.frames / seconds:,.0f}/s")
        gained = place.fraction - self.first
        if gained > 0.001 and place.fraction < 1:
            words.append(f"{seconds * (1 - place.fraction) / gained:,.0f} s left")
        if self.row is not None:
            self.bar.update(self.row, completed=place.fraction, rate=", ".join(words))


def shown_splits(manifest: Manifest) -> str:
    """Return the number of structures of a task, in total and in each split, as text."""
    counts = ", ".join(f"{split} {manifest.structures(split):,}" for split in manifest.splits)
    return f"{manifest.structures():,} structures ({counts})"


def _print_summary(manifest: Manifest, out: Path, settings: ConvertSettings) -> None:
    echo(f"{out}: {shown_splits(manifest)}")
    if manifest.duplicate_count:
        what = "left out" if settings.duplicates == "drop" else "kept, in the split of the first one"
        echo(f"duplicates: {manifest.duplicate_count:,} structures repeat an earlier geometry ({what})")
    for reason, count in manifest.set_aside.items():
        echo(f"skipped, {reason}: {count:,}")
    for split, kind, use in (("val", "validation", "choose the best step"), ("test", "test", "evaluate the model")):
        if not manifest.structures(split):
            echo(f"warning: there are no {kind} structures, with which to {use}; add frames or change [split]")
    for note in task_notes(manifest):
        echo(note)
