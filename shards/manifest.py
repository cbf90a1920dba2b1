"""The manifest of a task: `manifest.json` beside the shards. It is written last: its presence means a complete task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, TypeAdapter

from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.files import MOST_BYTES, write_text
from hydrazero.shards.location import Location, address, check_file, is_remote, read_whole
from hydrazero.shards.manifest_parts import (
    Degrees,
    Histogram,
    LabelRange,
    Number,
    Outlier,
    Shard,
    is_consistent,
    shard_contradiction,
)
from hydrazero.shards.settings_parser import STRICT, Count, DistanceText, Element, Pair, parse_typed
from hydrazero.shards.targets import TargetName, TargetStatistics
from hydrazero.shards.text.foreign_text import escaped
from hydrazero.shards.text.names import FileName, path_fault
from hydrazero.shards.units import INTERNAL_UNITS

FORMAT = "hydrazero-shards"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val", "test")

STATISTICS = {"energy": "energy_per_atom", "forces": "forces", "stress": "stress"}
"""Label -> name of its statistics among the labels of a manifest."""
AGAIN = "convert the task again"


LabelName = Annotated[str, Field(pattern="^(energy_per_atom|energy_residual_per_atom|forces|stress)$")]
SplitName = Annotated[str, Field(pattern=f"^({'|'.join(SPLITS)})$")]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a task, which is known without opening its shards."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}

    task: FileName
    splits: dict[SplitName, list[Shard]]
    float_dtype: Literal["float32", "float64"]
    """Precision of positions, forces and stress in the blocks: 'float32' or 'float64'."""
    elements: dict[Element, PositiveInt]
    """Symbol -> number of atoms in all splits."""
    trained_elements: list[Element]
    """Elements of the training split; elements that only other splits contain have no reference energy."""
    size_histogram: dict[PositiveInt, PositiveInt]
    """Number of atoms -> number of structures."""
    labels: dict[LabelName, LabelRange]
    """Statistics of the training split: 'energy_per_atom', 'energy_residual_per_atom' (the energy minus reference
    energies), 'forces' and 'stress'."""
    reference_energies: dict[Element, Number]
    """Element -> energy per atom in eV, by the way in `references`."""
    required_labels: list[Annotated[str, Field(pattern=r"^[^\W\d]\w*$")]]
    """Labels that every structure has."""
    periodic_structures: Count
    bound_residual_rms: Annotated[Number, Field(ge=0)] | None = None
    """Root mean square of the energy minus reference energies over the training structures that are no isolated atoms,
    eV/atom; null if there are none or it is unknown."""
    references: str = "fit"
    """Where reference energies come from: 'fit' (least squares over the training split) or 'isolated' (its isolated
    atoms)."""
    isolated_atoms: dict[Element, Number] = field(default_factory=dict)
    """Element -> energy in eV of a neutral isolated atom in the training split, the lowest if there are several."""
    undetermined_sums: list[Annotated[dict[Element, Number], Field(min_length=1)]] = field(default_factory=list)
    """Combinations of elements, each element -> coefficient, that the training compositions leave open: any multiple
    of one may be added to the reference energies. Energies of compositions that are not orthogonal to all of them are
    arbitrary."""
    unused_stresses: Count = 0
    """Number of structures with a stress that is not used, since they have no volume to which it refers."""
    warnings: list[str] = field(default_factory=list)
    """What is doubtful in the labels, in sentences."""
    targets: dict[TargetName, TargetStatistics] = field(default_factory=dict)
    """Name -> statistics of a further quantity of the training split."""
    charged_structures: Count = 0
    """Number of structures with a charge, or a spin multiplicity other than 1."""
    multiplicity_known: Count = 0
    """Number of structures whose spin multiplicity is known."""
    degrees: dict[DistanceText, Degrees] = field(default_factory=dict)
    """Cutoff in Å as text -> numbers of neighbours within it, over all splits."""
    closest: dict[Pair, Annotated[float, Field(ge=0, le=1e3)]] = field(default_factory=dict)
    """Two elements as 'Al-Cu', the lighter one first -> smallest distance in the training split in Å, rounded down to
    hundredths."""
    closest_within: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Distance in Å up to which pairs were searched: pairs that `closest` lacks are farther apart. 0 if there was no
    search."""
    distributions: dict[str, Histogram] = field(default_factory=dict)
    """Histograms of the training split: 'energy_residual_per_atom' in eV/atom and 'force_norm' in eV/Å."""
    outliers: dict[str, list[Outlier]] = field(default_factory=dict)
    """The same labels, and 'stress' in eV/Å³ -> the most extreme structures of all splits."""
    duplicates: list[str] = field(default_factory=list)
    """Duplicates as 'source id = earlier source id', at most the first 1000."""
    duplicate_count: Count = 0
    set_aside: dict[str, Count] = field(default_factory=dict)
    """Reason -> number of frames that were left out."""
    source: dict[str, str] = field(default_factory=dict)
    """Free text: method, basis, code, citation, licence, files."""
    units: dict[str, str] = field(default_factory=lambda: dict(INTERNAL_UNITS))

    def structures(self, split: str | None = None) -> int:
        """Return the number of structures in a split, or in all splits."""
        names: Sequence[str] = SPLITS if split is None else (split,)
        return sum(shard.structures for name in names for shard in self.splits.get(name, []))

    def atoms(self, split: str | None = None) -> int:
        """Return the number of atoms in a split, or in all splits."""
        names: Sequence[str] = SPLITS if split is None else (split,)
        return sum(shard.atoms for name in names for shard in self.splits.get(name, []))

    @property
    def max_atoms(self) -> int:
        """Number of atoms of the largest structure."""
        return max(self.size_histogram)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a manifest to a temporary file, flush that to the disk, and rename it."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    write_text(folder / MANIFEST_NAME, json.dumps(document, indent=1, allow_nan=False), durable=True)


def read_manifest(folder: Location) -> Manifest:
    """Return the manifest of a folder; raise ShardError if it is missing, incomplete, or of another version."""
    path = address(folder, MANIFEST_NAME)
    text = _manifest_bytes(folder)
    head = parse_typed(_HEAD, text, str(path), ShardError, hint=AGAIN)
    if head.format != FORMAT:
        raise ShardError(
            f"{path} is not a manifest of hydrazero shards; name a folder that hydrazero convert has made."
        )
    if head.format_version != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {escaped(str(head.format_version)[:20])}, but hydrazero reads format "
            f"version {FORMAT_VERSION}; use a matching version of hydrazero, or convert the task again."
        )
    manifest = parse_typed(_MANIFEST, text, f"{path} has a missing or wrong field:", ShardError, hint=AGAIN)
    if fault := _contradiction(manifest):
        raise ShardError(f"{path} contradicts itself ({fault}); {AGAIN}.")
    return manifest


def check_different_tasks(manifests: Sequence[Manifest], folders: Sequence[Path]) -> None:
    """Raise ConfigError if two folders hold tasks of the same name."""
    names = [manifest.task for manifest in manifests]
    for name in names:
        if names.count(name) > 1:
            both = " and ".join(str(each) for each, other in zip(folders, names, strict=True) if other == name)
            raise ConfigError(f"{both} both hold a task '{name}'; name folders of different tasks.")


def manifest_sha256(folder: Location) -> str:
    """Return the SHA-256 of a manifest in hexadecimal; it identifies the shards too, since their own are in it."""
    return hashlib.sha256(_manifest_bytes(folder)).hexdigest()


def _manifest_bytes(folder: Location) -> bytes:
    if is_remote(folder):
        try:
            return read_whole(folder, MANIFEST_NAME)
        except OSError as error:
            raise ShardError(f"{address(folder, MANIFEST_NAME)} cannot be read ({error}).") from error
    path = Path(str(folder)) / MANIFEST_NAME
    if not path.parent.exists():
        raise ShardError(f"{folder} does not exist; name a folder that 'hydrazero convert' has written.")
    if not path.is_file():
        raise ShardError(
            f"{folder} holds no {MANIFEST_NAME}, so it is not a finished conversion; run 'hydrazero convert'."
        )
    check_file(str(folder), MANIFEST_NAME)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ShardError(f"{path} has {size:,} bytes, more than the {MOST_BYTES:,} that are read; {AGAIN}.")
    return path.read_bytes()


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What a file says about its own format."""

    format: object = None
    format_version: object = None


_HEAD, _MANIFEST = TypeAdapter(_Head), TypeAdapter(Manifest)


def _contradiction(manifest: Manifest) -> str:
    """Return what in a manifest does not fit the rest of it, "" if all fits."""
    shards = [shard for each in manifest.splits.values() for shard in each]
    if len({shard.file for shard in shards}) < len(shards):
        return "two shards have the same file"
    for shard in shards:
        if fault := shard_contradiction(shard):
            return f"{shard.file}: {fault}"
    if manifest.units != INTERNAL_UNITS:
        return f"its units are {manifest.units}, not {INTERNAL_UNITS}"
    if fault := _label_contradiction(manifest):
        return fault
    sizes = manifest.size_histogram
    totals = {
        "structures": sum(sizes.values()),
        "atoms": sum(size * count for size, count in sizes.items()),
        "atoms by element": sum(manifest.elements.values()),
    }
    for cutoff, degrees in manifest.degrees.items():
        totals[f"atoms by neighbours within {cutoff} Å"] = sum(degrees.histogram.values())
    for what, there in totals.items():
        if (here := manifest.structures() if what == "structures" else manifest.atoms()) != there:
            return f"its shards hold {here:,} {what.split(' by ')[0]}, its counts of {what} add up to {there:,}"
    for cutoff, degrees in manifest.degrees.items():
        mean = degrees.edges / max(manifest.structures(), 1)
        if not mean <= degrees.most_edges <= min(degrees.edges, degrees.most_slots):
            return f"degrees.{cutoff}: its counts do not fit the largest numbers of edges and slots"
    if len(set(manifest.trained_elements)) < len(manifest.trained_elements):
        return "trained_elements names an element twice"
    if extra := set(manifest.trained_elements) - set(manifest.elements):
        return f"trained_elements names {', '.join(sorted(extra))}, which no structure holds"
    if manifest.reference_energies and (lost := set(manifest.trained_elements) - set(manifest.reference_energies)):
        return f"reference_energies lacks {', '.join(sorted(lost))}"
    most = max(manifest.periodic_structures, manifest.charged_structures, manifest.multiplicity_known)
    return "" if most <= manifest.structures() else f"it counts {most:,} of {manifest.structures():,} structures"


def _label_contradiction(manifest: Manifest) -> str:
    for name, label in manifest.labels.items():
        if not is_consistent(label):
            return f"labels.{name}: minimum, mean, rms and maximum cannot belong to the same numbers"
    for label_name, statistics in STATISTICS.items():
        if label_name in manifest.required_labels and statistics not in manifest.labels:
            return f"it requires {label_name}, and labels lacks {statistics}"
    for name, histogram in manifest.distributions.items():
        edges = histogram.edges
        if len(edges) != len(histogram.counts) + 1 or sorted(edges) != edges:
            return f"distributions.{name}: its edges do not bound its counts"
    return ""


def check_shard_files(manifest: Manifest, folder: Location, *, checksums: bool = False) -> None:
    """Raise ShardError if a shard is missing or its size differs from that in the manifest.

    With `checksums`, every byte is read and the SHA-256 is compared too; without it, damage is found by the CRC-32 of
    each block when it is read. Remote shards are not checked before they are read.
    """
    if is_remote(folder):
        return
    for split, shards in manifest.splits.items():
        for shard in shards:
            path = Path(str(folder)) / shard.file
            if (fault := path_fault(Path(str(folder)), shard.file)) is not None:
                raise ShardError(f"shard {path} ({split}) {fault}; copy it again or convert the task again.")
            size = path.stat().st_size
            if size != shard.bytes:
                raise ShardError(
                    f"shard {path} has {size} bytes, but {shard.bytes} according to the manifest: it is truncated or "
                    "changed; copy it again or convert the task again."
                )
            if checksums and file_sha256(path) != shard.sha256:
                raise ShardError(
                    f"shard {path} does not have the checksum of the manifest; copy it again or convert the task again."
                )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
