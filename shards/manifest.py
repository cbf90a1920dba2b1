"""The manifest of a task's shards: `manifest.json` beside the tars, written last, so that its presence means done."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import ShardError
from hydrazero.shards.units import INTERNAL_UNITS

FORMAT = "hydrazero-shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file and the blocks in it."""

    file: str
    """Name beside the manifest."""
    bytes: int
    sha256: str
    structures: int
    atoms: int
    block_offsets: list[int]
    """Byte at which each block's tar member starts."""
    block_structures: list[int]
    """Structures in each block."""
    block_crc32: list[int]
    """CRC-32 of each block's bytes, checked at every read."""


@dataclass(frozen=True, kw_only=True)
class LabelRange:
    """Count and range of one label over the task; forces per component, energy per atom."""

    count: int
    minimum: float
    maximum: float
    mean: float
    rms: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a reader of the shards needs to know without opening them."""

    task: str
    splits: dict[str, list[Shard]]
    float_dtype: str
    """Of positions, forces and stress in the blocks."""
    elements: dict[str, int]
    """Symbol -> atoms of it, in all splits."""
    trained_elements: list[str]
    """Elements of the training split; those that only the others hold have no reference energy."""
    size_histogram: dict[int, int]
    """Atoms per structure -> structures."""
    labels: dict[str, LabelRange]
    """Of the training split: 'energy_per_atom', 'energy_residual_per_atom' (less references), 'forces', 'stress'."""
    reference_energies: dict[str, float]
    """eV per atom of each element: least squares on the training split."""
    required_labels: list[str]
    """Labels that every structure has."""
    periodic_structures: int
    duplicates: list[str] = field(default_factory=list)
    """'source id = earlier source id', at most the first 1000."""
    duplicate_count: int = 0
    set_aside: dict[str, int] = field(default_factory=dict)
    """Frames that were left out, by reason."""
    source: dict[str, str] = field(default_factory=dict)
    """Free text: method, basis, code, citation, licence, files."""
    units: dict[str, str] = field(default_factory=lambda: dict(INTERNAL_UNITS))

    def structures(self, split: str | None = None) -> int:
        """Structures in a split, or in all."""
        names = SPLITS if split is None else (split,)
        return sum(shard.structures for name in names for shard in self.splits.get(name, []))

    def atoms(self, split: str | None = None) -> int:
        """Atoms in a split, or in all."""
        names = SPLITS if split is None else (split,)
        return sum(shard.atoms for name in names for shard in self.splits.get(name, []))

    @property
    def max_atoms(self) -> int:
        """Atoms of the largest structure."""
        return max(self.size_histogram)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write atomically: aside, flushed to disk, then renamed."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    temporary = folder / (MANIFEST_NAME + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST_NAME)


def read_manifest(folder: Path | str) -> Manifest:
    """Read and check a manifest; raises ShardError if it is missing, not ours, newer, or incomplete."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ShardError(f"{folder} holds no {MANIFEST_NAME}: it is no finished conversion; run 'hydrazero convert'.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path} is not readable JSON ({error}); convert the task again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ShardError(f"{path} is not a manifest of hydrazero shards.")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {version}, this hydrazero reads version {FORMAT_VERSION}; "
            "use a matching hydrazero or convert the task again."
        )
    try:
        return _manifest_from_document(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{path} lacks or misuses a field ({error}); convert the task again.") from error


def _manifest_from_document(document: dict[str, Any]) -> Manifest:
    names = {f.name for f in fields(Manifest)}
    values = {name: value for name, value in document.items() if name in names}
    values["splits"] = {split: [Shard(**shard) for shard in shards] for split, shards in document["splits"].items()}
    values["labels"] = {name: LabelRange(**value) for name, value in document["labels"].items()}
    values["size_histogram"] = {int(size): count for size, count in document["size_histogram"].items()}
    return Manifest(**values)


def check_shard_files(manifest: Manifest, folder: Path | str, *, checksums: bool = False) -> None:
    """Raise ShardError if a shard is missing or has another size than the manifest says.

    With `checksums` every byte is read and the SHA-256 compared too; without, damage is found by the CRC-32 of each
    block when it is read.
    """
    for split, shards in manifest.splits.items():
        for shard in shards:
            path = Path(folder) / shard.file
            if not path.is_file():
                raise ShardError(f"shard {path} ({split}) is missing; copy it again or convert the task again.")
            size = path.stat().st_size
            if size != shard.bytes:
                raise ShardError(
                    f"shard {path} has {size} bytes where the manifest says {shard.bytes}: it is truncated or changed; "
                    "copy it again or convert the task again."
                )
            if checksums and file_sha256(path) != shard.sha256:
                raise ShardError(
                    f"shard {path} has another checksum than the manifest says; copy or convert the task again."
                )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
