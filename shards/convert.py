"""The converter: source files in, shards and a manifest out, all of it or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
from ase.data import chemical_symbols

from hydrazero.shards.convert_settings import ConvertSettings
from hydrazero.shards.errors import ConfigError, SourceError, StructureError
from hydrazero.shards.manifest import SPLITS, Manifest, write_manifest
from hydrazero.shards.readers import read_frames
from hydrazero.shards.readers.frames import Frame
from hydrazero.shards.references import fit_reference_energies, label_ranges
from hydrazero.shards.splits import group_key, split_of
from hydrazero.shards.structure import Structure
from hydrazero.shards.writer import write_split

SET_ASIDE_NAME = "set_aside.jsonl"
NAMED_DUPLICATES = 1000


@dataclass(kw_only=True)
class Collected:
    """Frames on their way into splits."""

    by_split: dict[str, list[Structure]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    first_with: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    """Geometry hash -> (source id, split) of its first frame."""
    duplicates: list[str] = field(default_factory=list)
    duplicate_count: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    set_aside_lines: list[str] = field(default_factory=list)


def convert(
    sources: Sequence[Path],
    task: str,
    out: Path,
    settings: ConvertSettings,
    *,
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Convert source files into the shards of a task in the new folder `out`.

    The folder appears when everything is in it; a conversion that fails or is killed leaves nothing of that name. A bad
    frame ends it with a SourceError naming file and frame; with `skip_bad` it is set aside, counted by reason and
    listed in set_aside.jsonl. Raises ConfigError for a task name that is no word or an `out` that exists.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", task):
        raise ConfigError(f"task name '{task}' must be of letters, digits, '_' and '-'.")
    if out.exists():
        raise ConfigError(f"output folder {out} exists; remove it or choose another name.")
    collected = Collected()
    names = _distinct_names(sources)
    for source, name in zip(sources, names, strict=True):
        for frame in read_frames(source, settings.read_settings()):
            _collect(_named(frame, name), source, settings, collected, skip_bad)
            if progress is not None:
                progress(1)
    if not collected.by_split["train"]:
        raise SourceError(_no_training_frames(task, collected))
    with _appearing_whole(out) as folder:
        return _write(collected, task, names, settings, folder)


def _distinct_names(sources: Sequence[Path]) -> list[str]:
    """Name of each source for source ids: the file's, or its path below the common folder where names repeat."""
    paths = [Path(os.path.abspath(source)) for source in sources]
    if len({path.name for path in paths}) == len(set(paths)):
        return [path.name for path in paths]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def _named(frame: Frame, name: str) -> Frame:
    """Put the source's name into the frame's source id."""
    file, _, number = frame.source_id.rpartition("#")
    if file == name:
        return frame
    source_id = f"{name}#{number}"
    structure = None if frame.structure is None else replace(frame.structure, source_id=source_id)
    return replace(frame, source_id=source_id, structure=structure)


def _no_training_frames(task: str, collected: Collected) -> str:
    total = sum(len(part) for part in collected.by_split.values())
    if total == 0 and collected.set_aside:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(collected.set_aside.items()))
        return f"task '{task}': every frame was set aside ({reasons}); mend the sources or the settings."
    return f"task '{task}': none of {total} usable frames falls into the training split; add frames."


def _collect(frame: Frame, source: Path, settings: ConvertSettings, collected: Collected, skip_bad: bool) -> None:
    """Sort one frame into its split, or set it aside."""
    # A frame that could not even be parsed has no fields to be left out by: it is bad, not unwanted.
    parsed = frame.structure is not None or bool(frame.info)
    if parsed and any(str(frame.info.get(key)) not in map(str, wanted) for key, wanted in settings.select.items()):
        collected.set_aside["not_selected"] += 1
        return
    try:
        if frame.structure is None:
            raise frame.error or StructureError("unreadable", "the frame cannot be read")
        structure = frame.structure
        key = structure.geometry_hash()
        if key in collected.first_with:
            _note_duplicate(structure, key, settings, collected)
            return
        split = split_of(group_key(frame, structure, settings.split.group), settings.split)
    except StructureError as error:
        if not skip_bad:
            number = frame.source_id.rpartition("#")[2]
            hint = "mend it, or use --skip-bad to set bad frames aside"
            raise SourceError(f"{source}, frame {number}: {error}; {hint}.") from error
        collected.set_aside[error.reason] += 1
        line = {"source_id": frame.source_id, "reason": error.reason, "message": str(error)}
        collected.set_aside_lines.append(json.dumps(line))
        return
    collected.first_with[key] = (structure.source_id, split)
    collected.by_split[split].append(structure)


def _note_duplicate(structure: Structure, key: bytes, settings: ConvertSettings, collected: Collected) -> None:
    """Count a geometry that has come before; if kept, it follows the first into its split, never into another."""
    first, split = collected.first_with[key]
    collected.duplicate_count += 1
    if len(collected.duplicates) < NAMED_DUPLICATES:
        collected.duplicates.append(f"{structure.source_id} = {first}")
    if settings.duplicates == "keep":
        collected.by_split[split].append(structure)


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """Give a folder aside to write into; it becomes `out` at the end, or is removed if anything goes wrong."""
    # A random name: process ids repeat between containers, and a killed conversion may have left its folder.
    part = out.parent / f".{out.name}.part-{uuid4().hex[:12]}"
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(collected: Collected, task: str, files: Sequence[str], settings: ConvertSettings, folder: Path) -> Manifest:
    shards = {}
    for index, split in enumerate(SPLITS):
        structures = collected.by_split[split]
        # Neighbouring frames of a source are alike; blocks should hold a mixture.
        order = np.random.default_rng((settings.split.seed, index)).permutation(len(structures))
        shards[split] = write_split(folder, split, [structures[i] for i in order], settings.float_dtype)
    everything = [s for split in SPLITS for s in collected.by_split[split]]
    training = collected.by_split["train"]
    references = fit_reference_energies(training)
    counts = np.sum([np.bincount(s.numbers, minlength=119) for s in everything], axis=0)
    texts = {key: str(value) for key, value in settings.source.items()}
    manifest = Manifest(
        task=task,
        splits=shards,
        float_dtype=settings.float_dtype,
        elements={chemical_symbols[z]: int(counts[z]) for z in np.flatnonzero(counts)},
        trained_elements=sorted(references),
        size_histogram=dict(sorted(Counter(len(s) for s in everything).items())),
        labels=label_ranges(training, references),
        reference_energies=references,
        required_labels=list(settings.labels.require),
        periodic_structures=sum(bool(s.pbc.any()) for s in everything),
        duplicates=collected.duplicates,
        duplicate_count=collected.duplicate_count,
        set_aside=dict(sorted(collected.set_aside.items())),
        source={**texts, "files": ", ".join(files)},
    )
    if collected.set_aside_lines:
        with open(folder / SET_ASIDE_NAME, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in collected.set_aside_lines)
            file.flush()
            os.fsync(file.fileno())
    write_manifest(manifest, folder)
    return manifest
