"""First part of a conversion: workers read the frames of the sources into chunks on the disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from hydrazero.shards.block import StructureBlock, block_from_structures, columns_of
from hydrazero.shards.convert.checks.left_out_atoms import LeftOutAtoms
from hydrazero.shards.convert.checks.methods import MethodFields
from hydrazero.shards.convert.checks.unread_conditions import UnreadConditions
from hydrazero.shards.convert.checks.unread_stress import UnreadStress
from hydrazero.shards.convert.checks.work import WorkPairs
from hydrazero.shards.convert.folder import Conversion
from hydrazero.shards.convert.splits import group_key, is_isolated_atom, is_selected, split_of, split_of_file
from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.files import write_bytes, write_text
from hydrazero.shards.manifest import SPLITS
from hydrazero.shards.readers import Frame, unread
from hydrazero.shards.readers.frames import SourceUnits
from hydrazero.shards.structure import Structure
from hydrazero.shards.targets import ATOM_PREFIX, STRUCTURE_PREFIX
from hydrazero.shards.text.foreign_text import escaped

CHUNK_FRAMES = 1024
"""Number of frames in a chunk, which is also what is lost when a conversion is killed."""

SLICED_BYTES = 2_000_000
"""Sources smaller than this number of bytes are read by one worker each."""


@dataclass(kw_only=True)
class Chunk:
    """Up to CHUNK_FRAMES frames of a source: usable structures, and notes of the frames that are left out."""

    structures: list[Structure] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    not_selected: int = 0
    lacking: Counter[str] = field(default_factory=Counter)
    """Key of [select] -> number of frames without such a field."""
    fields: tuple[str, ...] = ()
    """Fields of the last frame that lacks a key of [select]."""
    bad: list[dict[str, str]] = field(default_factory=list)
    """Source id, reason and message of each skipped bad frame."""
    work: WorkPairs = field(default_factory=WorkPairs)
    """Pairs of successive frames whose labels can be compared."""
    left_out_atoms: LeftOutAtoms = field(default_factory=LeftOutAtoms)
    """Isolated atoms among the frames that are left out."""
    methods: MethodFields = field(default_factory=MethodFields)
    """Values of the fields that name the method of the labels."""
    unread_conditions: UnreadConditions = field(default_factory=UnreadConditions)
    """Values of fields that look like a charge or a spin and are not read."""
    unread_stress: UnreadStress = field(default_factory=UnreadStress)
    """Names of fields that look like a stress and are not read."""
    units: SourceUnits | None = None
    """Units of the first structure."""

    def add(self, frame: Frame, job: Conversion, source: Path) -> None:
        """Add a frame; raise SourceError for a bad one unless bad frames are skipped."""
        settings = job.settings
        # A frame that could not be parsed has no fields to select by: it is bad, not unselected.
        parsed = frame.structure is not None or bool(frame.info)
        if parsed and not is_selected(frame.info, settings.select):
            self.not_selected += 1
            self.left_out_atoms.add(frame, settings.select, settings.degree_cutoffs)
            lacking = settings.select.keys() - frame.info.keys()
            self.lacking.update(lacking)
            self.fields = tuple(map(str, frame.info)) if lacking else self.fields
            return
        try:
            if frame.structure is None:
                raise frame.error or StructureError("unreadable", "the frame cannot be read")
            key = group_key(frame, frame.structure, settings.split.group)
            split = split_of_file(source, settings.split)
            if split is None and settings.split.train and is_isolated_atom(frame.structure, settings.degree_cutoffs):
                split = "train"  # reference energies that are fitted without it could be wrong by any amount
            split = split or split_of(key, settings.split)
        except StructureError as error:
            if not job.skip_bad:
                number = frame.source_id.rpartition("#")[2]
                hint = "correct the frame, or skip bad frames with --skip-bad"
                raise SourceError(f"{source}, frame {number}: {error}; {hint}.") from error
            self.left_out_atoms.add(frame, settings.select, settings.degree_cutoffs)
            self.bad.append({"source_id": frame.source_id, "reason": error.reason, "message": str(error)})
            return
        self.structures.append(frame.structure)
        self.hashes.append(frame.structure.geometry_hash())
        self.splits.append(SPLITS.index(split))
        self.work.add(frame.structure)
        self.units = self.units or frame.units
        self.methods.add(frame.info)
        self.unread_conditions.add(frame.info, frame.structure, settings)
        self.unread_stress.add(frame.info, frame.structure, settings)

    def encode(self, float_dtype: str) -> bytes:
        """Serialise as safetensors: columns of a block, hashes and splits, with the left-out frames as metadata."""
        about = {"not_selected": str(self.not_selected), "bad": json.dumps(self.bad)}
        about["lacking"] = json.dumps([self.lacking, self.fields])
        about["left_out_atoms"] = json.dumps(self.left_out_atoms.listed())
        about["methods"] = json.dumps(self.methods.counts)
        about["units"] = self.units.model_dump_json() if self.units else ""
        about["unread_stress"] = json.dumps(self.unread_stress.counts)
        about["unread_conditions"] = json.dumps(self.unread_conditions.counts)
        columns: dict[str, Any] = {"splits": np.array(self.splits, dtype=np.uint8)}
        if self.structures:
            columns |= columns_of(block_from_structures(self.structures, float_dtype=float_dtype))
            # With these, the text of one structure can be read without those of all others.
            lengths = [len(s.source_id.replace("\n", " ").encode()) + 1 for s in self.structures]
            columns["name_starts"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            columns["hashes"] = np.frombuffer(b"".join(self.hashes), dtype=np.uint8).reshape(-1, 16)
            columns["work"] = self.work.table()
            columns["atom_starts"] = np.concatenate([[0], np.cumsum(columns["n_atoms"])]).astype(np.int64)
        return safetensors.numpy.save(columns, metadata=about)


def chunk_path(job: Conversion, source: int, chunk: int) -> Path:
    """Return the path of a chunk."""
    return job.frames / f"{source:06d}-{chunk:08d}.safetensors"


def frames_path(job: Conversion, source: int) -> Path:
    """Return the path of a file with the number of frames of a source; it exists once all of them have been read."""
    return job.frames / f"{source:06d}.json"


def status_path(job: Conversion, source: int, part: int) -> Path:
    """Return the path of a worker's progress file: number of frames it has read, and fraction of the source."""
    return job.frames / f"{source:06d}.{part}.status"


def read_part(job: Conversion, source: int, part: int, parts: int) -> int:
    """Read every `parts`-th chunk of a source, from chunk `part` on; return the number of frames of the whole source.

    The other chunks, and those that exist already, are skipped. Raises SourceError for faults of the source.
    """
    settings = job.settings.read_settings(trust_pickle=job.trust_pickle)
    chunk, written, read = Chunk(), -1, 0
    number = -1
    mine = False
    for number, unread_frame in enumerate(unread(job.sources[source], settings)):
        if number % CHUNK_FRAMES == 0:
            if mine:
                _write(job, source, written, chunk)
            if job.stop.exists():
                raise SourceError("the conversion was stopped.")
            written = number // CHUNK_FRAMES
            mine = written % parts == part and not chunk_path(job, source, written).exists()
            chunk = Chunk()
            write_text(status_path(job, source, part), f"{read} {unread_frame.fraction:.6f}")
        if mine:
            read += 1
            frame = _named(unread_frame.read(), job.sources[source].name, job.names[source])
            chunk.add(frame, job, job.sources[source])
    if mine:
        _write(job, source, written, chunk)
    write_text(status_path(job, source, part), f"{read} 1")
    return number + 1


def _write(job: Conversion, source: int, number: int, chunk: Chunk) -> None:
    check_one_unit(chunk.structures, job.sources[source])
    write_bytes(chunk_path(job, source, number), chunk.encode(job.settings.float_dtype), durable=True)


def _named(frame: Frame, file: str, name: str) -> Frame:
    """Replace the name of the file, with which source ids begin, by the distinct name of the source.

    Ids are one line that can be written, whatever the names of files, groups and members hold.
    """
    source_id = name + escaped(frame.source_id.removeprefix(file))
    if source_id == frame.source_id:
        return frame
    structure = None if frame.structure is None else replace(frame.structure, source_id=source_id)
    return replace(frame, source_id=source_id, structure=structure)


UNIT_RATIOS = {
    "eV and Hartree": 27.211386,
    "eV and Rydberg": 13.605693,
    "eV and kcal/mol": 23.060548,
    "eV and kJ/mol": 96.485332,
    "Hartree and kcal/mol": 627.509474,
    "Hartree and kJ/mol": 2625.499639,
    "eV and meV": 1000.0,
}
"""Ratios of two energies that differ only in their unit."""

SAME_ENERGY = 0.005
"""Relative difference between total energies of the same atoms that a change of geometry can explain."""


def check_one_unit(structures: Sequence[Structure], source: Path) -> None:
    """Raise SourceError if structures of the same atoms have energies that differ by the ratio of two units.

    The energies must fall into two groups of at least two structures, each of nearly equal energies: small energies,
    which depend mostly on the geometry, may differ by any factor.
    """
    by_atoms: dict[bytes, list[Structure]] = {}
    for structure in structures:
        if structure.energy:
            by_atoms.setdefault(np.sort(structure.numbers).tobytes(), []).append(structure)
    for members in by_atoms.values():
        energies = np.abs([structure.energy or 0.0 for structure in members])
        high = energies >= np.sqrt(energies.min() * energies.max())
        groups = energies[high], energies[~high]
        if min(map(len, groups)) < 2 or any(np.ptp(group) > SAME_ENERGY * group.max() for group in groups):
            continue
        ratio = float(np.median(groups[0]) / np.median(groups[1]))
        for units, expected in UNIT_RATIOS.items():
            if abs(ratio / expected - 1) < SAME_ENERGY:
                one, other = members[int(np.argmax(high))], members[int(np.argmin(high))]
                raise SourceError(
                    f"{source}: {one.source_id} and {other.source_id} hold the same atoms, but their "
                    f"energies differ by a factor of {ratio:.5g}, the ratio of {units}; split the source by units, and "
                    "convert each part as a task of its own."
                )


class ChunkFile:
    """A chunk on the disk; only the requested parts of it are read."""

    def __init__(self, path: Path) -> None:
        self._file = safetensors.safe_open(str(path), framework="numpy")
        about = self._file.metadata()
        self.not_selected = int(about["not_selected"])
        self.bad: list[dict[str, str]] = json.loads(about["bad"])
        self.lacking: dict[str, int]
        self.fields: list[str]
        self.lacking, self.fields = json.loads(about.get("lacking", "[{}, []]"))
        self.left_out_atoms = LeftOutAtoms(json.loads(about.get("left_out_atoms", "{}")))
        self.methods = MethodFields(json.loads(about.get("methods", "{}")))
        self.unread_conditions = UnreadConditions(json.loads(about.get("unread_conditions", "{}")))
        self.unread_stress = UnreadStress(json.loads(about.get("unread_stress", "{}")))
        self.units = SourceUnits.model_validate_json(about["units"]) if about.get("units") else None
        self._names = set(self._file.keys())

    def column(self, name: str) -> NDArray[Any]:
        """Return a complete column."""
        return self._file.get_tensor(name)

    def structures(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Yield (row, columns of that one structure) for each of the given rows."""
        atoms, names = self.column("atom_starts"), self.column("name_starts")
        slices = {name: self._file.get_slice(name) for name in self._names if is_column(name)}
        for row in rows.tolist():
            ranges = {
                "atoms": slice(int(atoms[row]), int(atoms[row + 1])),
                "structure": slice(row, row + 1),
                # Without the newline that separates it from the next.
                "text": slice(int(names[row]), int(names[row + 1]) - 1),
            }
            yield row, {name: column[ranges[length_of(name)]] for name, column in slices.items()}


LENGTHS = {"numbers": "atoms", "positions": "atoms", "forces": "atoms", "source_ids": "text"}
"""Columns that do not have one row per structure."""

COLUMNS = set(StructureBlock.__dataclass_fields__)


def is_column(name: str) -> bool:
    """Return whether an array of a chunk is a column of a block."""
    return name in COLUMNS or name.startswith((STRUCTURE_PREFIX, ATOM_PREFIX))


def length_of(name: str) -> str:
    """Return what the rows of a column stand for: a 'structure', 'atoms' or bytes of a 'text'."""
    return "atoms" if name.startswith(ATOM_PREFIX) else LENGTHS.get(name, "structure")
