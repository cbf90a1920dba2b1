"""The converter: source files become a folder of shards with a manifest, which is complete or does not appear at all.

A conversion has three parts: workers read frames into chunks on the disk (`frames`), one process builds an index that
finds duplicates and shuffles (`duplicates_and_order`), and workers write the shards from the chunks (`shards`). The
result depends on the sources and the settings alone, not on the number of workers. A conversion that is killed keeps
its finished work.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ase.data import chemical_symbols

from hydrazero.shards.convert.checks.label_warnings import label_warnings
from hydrazero.shards.convert.duplicates_and_order import Index, build_index
from hydrazero.shards.convert.element_pairs import closest_pairs
from hydrazero.shards.convert.folder import Conversion, distinct_names, working_folder
from hydrazero.shards.convert.frames import SLICED_BYTES, frames_path, read_part, status_path
from hydrazero.shards.convert.label_statistics import label_statistics, residuals_of, target_statistics
from hydrazero.shards.convert.references import chosen_references, undetermined_sums
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.convert.shards import ShardNote, make_shard, shard_calls
from hydrazero.shards.convert.task_statistics import Statistics, isolated_atoms
from hydrazero.shards.convert.workers import Workers, one_worker
from hydrazero.shards.errors import ConfigError, HydrazeroError, SourceError
from hydrazero.shards.files import write_json
from hydrazero.shards.manifest import SPLITS, Manifest, write_manifest
from hydrazero.shards.manifest_parts import Shard
from hydrazero.shards.readers import find_sources
from hydrazero.shards.readers.column_names import listed
from hydrazero.shards.targets import TargetStatistics
from hydrazero.shards.units import target_unit


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a conversion."""

    part: str
    """'reading', 'sorting', 'writing' or 'counting'."""
    frames: int
    """Number of frames read since the conversion was started or resumed."""
    fraction: float
    """Finished fraction of the part, 0 to 1."""


def convert(
    sources: Sequence[Path],
    task: str,
    out: Path,
    settings: ConvertSettings,
    *,
    workers: Workers | None = None,
    skip_bad: bool = False,
    trust_pickle: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Manifest:
    """Convert source files into the shards of a task in the new folder `out`; return its manifest.

    `workers` share the work; None stands for one worker in this process. The folder appears when it is complete. A
    conversion that was killed, or that found the disk full, resumes when it is started again with the same sources and
    settings. A bad frame raises SourceError with the file and frame; with `skip_bad` it is skipped, counted by reason
    and listed in set_aside.jsonl. `trust_pickle` allows loading sources of pickles, which can run any code. Raises
    ConfigError for an invalid task name, an `out` that exists, or files that cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", task):
        raise ConfigError(f"task name '{task}' must consist of letters, digits, '_' and '-'.")
    if out.exists():
        raise ConfigError(f"output folder {out} exists; remove it or choose another name.")
    found = find_sources(sources, settings.read_settings(trust_pickle=trust_pickle))
    job = Conversion(
        task=task,
        sources=found.files,
        names=distinct_names(found.files),
        settings=settings,
        skip_bad=skip_bad,
        trust_pickle=trust_pickle,
        folder=(out.parent / f".{out.name}.part").absolute(),
        not_read=found.not_read,
    )
    with working_folder(job):
        try:
            with ExitStack() as stack:
                manifest = _convert(job, workers or stack.enter_context(one_worker()), progress)
            job.shards.rename(out)
        except HydrazeroError:
            shutil.rmtree(job.folder, ignore_errors=True)
            raise
        except OSError as error:
            raise ConfigError(
                f"{out} cannot be written ({error.strerror or error}); fix that and start the same command again: "
                f"finished work is kept in {job.folder}."
            ) from error
        shutil.rmtree(job.folder, ignore_errors=True)
    return manifest


def _convert(job: Conversion, workers: Workers, progress: Callable[[Progress], None]) -> Manifest:
    _read(job, workers, progress)
    progress(Progress(part="sorting", frames=0, fraction=0.0))
    index = build_index(job)
    if not len(index.orders["train"]):
        raise SourceError(_no_training_frames(job, index))
    calls = shard_calls(job, index.orders)

    def watch() -> None:
        done = sum(1 for _ in job.notes.iterdir())
        progress(Progress(part="writing", frames=0, fraction=min(done / len(calls), 1.0)))

    notes: list[ShardNote] = workers.run_all(make_shard, calls, watch)
    by_split = {split: [n.shard for n, call in zip(notes, calls, strict=True) if call[1] == split] for split in SPLITS}
    total = Statistics()
    for note in notes:
        total.merge(note.statistics)
    progress(Progress(part="counting", frames=0, fraction=0.0))
    manifest = _manifest(job, index, by_split, total, workers)
    write_manifest(manifest, job.shards)
    return manifest


def _read(job: Conversion, workers: Workers, progress: Callable[[Progress], None]) -> None:
    """Read all sources into chunks, except those that are complete already."""
    parts = workers.count
    wanted = [number for number in range(len(job.sources)) if not frames_path(job, number).exists()]
    sizes = [_bytes_of(source) for source in job.sources]
    calls = [
        (job, number, part, parts if sizes[number] > SLICED_BYTES else 1)
        for number in wanted
        for part in range(parts if sizes[number] > SLICED_BYTES else 1)
    ]
    done_before = sum(size for number, size in enumerate(sizes) if number not in set(wanted))

    def watch() -> None:
        frames, behind = 0, float(done_before)
        for _, number, part, share in calls:
            path = status_path(job, number, part)
            words = path.read_text().split() if path.exists() else []
            if len(words) == 2:  # otherwise the worker is just writing it
                frames += int(words[0])
                behind += float(words[1]) * sizes[number] / share
        progress(Progress(part="reading", frames=frames, fraction=behind / max(sum(sizes), 1)))

    try:
        counts = workers.run_all(read_part, calls, watch)
    except BaseException:
        job.stop.touch()  # otherwise the other workers would read their sources to the end
        raise
    watch()
    for (_, number, _, _), frames in zip(calls, counts, strict=True):
        write_json(frames_path(job, number), frames, durable=True)


def _bytes_of(source: Path) -> int:
    if source.is_dir():
        return sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    return source.stat().st_size if source.exists() else 0


def _no_training_frames(job: Conversion, index: Index) -> str:
    total = sum(len(order) for order in index.orders.values())
    if total == 0 and index.set_aside:
        absent = [key for key, count in index.lacking.items() if count == index.set_aside["not_selected"]]
        if absent:
            there = listed(index.fields) or "no field"
            return f"task '{job.task}': no frame has the field '{absent[0]}' of [select]; the frames have {there}."
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(index.set_aside.items()))
        return f"task '{job.task}': every frame was skipped ({reasons}); fix the sources or the settings."
    return f"task '{job.task}': none of the {total} usable frames is in the training split; add frames."


def _manifest(
    job: Conversion, index: Index, splits: dict[str, list[Shard]], total: Statistics, workers: Workers
) -> Manifest:
    isolated = isolated_atoms(total)
    references = chosen_references(total.triangle, isolated, job.settings.references, job.task)
    cutoffs = job.settings.degree_cutoffs
    calls = [(job.shards, shard, references, cutoffs) for shards in splits.values() for shard in shards]
    residuals = workers.run_all(residuals_of, calls, lambda: None) if references else []
    found = label_statistics(total, residuals, len(splits["train"]))
    targets = {
        name: _target_facts(job, name, total)
        for name, target in job.settings.targets.items()
        if name in total.targets or not target.optional
    }
    texts = {key: str(value) for key, value in job.settings.source.items()}
    undetermined = undetermined_sums(total.triangle)
    doubts = label_warnings(job, index.evidence, index.equal_geometries, total)
    doubts += index.left_out_atoms.warnings(undetermined, {chemical_symbols[z] for z in total.elements})
    return Manifest(
        task=job.task,
        splits=splits,
        float_dtype=job.settings.float_dtype,
        elements={chemical_symbols[z]: count for z, count in sorted(total.elements.items())},
        trained_elements=sorted(references or (chemical_symbols[z] for z in total.trained)),
        size_histogram=dict(sorted(total.sizes.items())),
        labels=found.labels,
        bound_residual_rms=found.bound_residual_rms,
        reference_energies=references,
        references=job.settings.references,
        isolated_atoms=isolated,
        undetermined_sums=undetermined,
        unused_stresses=total.unused_stresses,
        warnings=[*job.not_read, *doubts],
        required_labels=list(job.settings.labels.require),
        periodic_structures=total.periodic,
        targets=targets,
        charged_structures=total.charged,
        multiplicity_known=total.multiplicity_known,
        degrees={f"{cutoff:g}": degrees for cutoff, degrees in total.degrees.items()},
        closest=closest_pairs(total.closest),
        closest_within=max(cutoffs, default=0.0),
        distributions=found.distributions,
        outliers=found.outliers,
        duplicates=index.duplicates,
        duplicate_count=index.duplicate_count,
        set_aside=dict(sorted(index.set_aside.items())),
        source={**texts, "files": ", ".join(job.names)},
    )


def _target_facts(job: Conversion, name: str, total: Statistics) -> TargetStatistics:
    """Return the statistics of a target for the manifest; raise SourceError if no training structure has the target."""
    target = job.settings.targets[name]
    moments = total.targets.get(name)
    if moments is None or not moments.count:
        raise SourceError(
            f"task '{job.task}': no training structure has the target '{name}' (field '{target.field}'); under "
            "[targets], name a field of the sources, remove the target, or set optional = true."
        )
    return target_statistics(
        moments, of=target.of, kind=target.kind, unit=target_unit(target.unit)[1], extensive=target.extensive
    )
