"""Structures made from prototypes by substituting elements and applying strains, one by one and never stored."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii
from ase.formula import Formula
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hydrazero.models.inference.ase_structure import check_names, conditions_of
from hydrazero.models.screening.settings import CHUNK
from hydrazero.models.screening.sources import GEOMETRY_ALONE, ChunkFilter, Item, Items
from hydrazero.shards.errors import ConfigError, StructureError
from hydrazero.shards.files import read_toml
from hydrazero.shards.manifest import file_sha256
from hydrazero.shards.readers import read_frames
from hydrazero.shards.settings_parser import ListOf, Section, parse_settings
from hydrazero.shards.structure import Structure, atomic_numbers_of, check_structure

MAX_SUBSTITUTIONS = 20_000_000
"""Maximum number of ways to place elements on the sites of one prototype."""
CUBIC = ("sc", "fcc", "bcc", "diamond", "zincblende", "rocksalt", "fluorite", "cesiumchloride")
"""Crystal structures that are built as cubic cells; others have the primitive cell that ASE builds."""


class PrototypeSection(Section):
    """A structure whose elements are substituted."""

    name: str
    """Name of the prototype, with which the names of its structures begin."""
    file: str = ""
    """Structure file that ASE can read; a relative path counts from the folder of the specification. Either `file` or
    `crystal` must be given."""
    crystal: str = ""
    """Crystal structure of `ase.build.bulk`: 'rocksalt', 'zincblende', 'fluorite', 'fcc' and so on."""
    formula: str = ""
    """Chemical formula of the crystal, such as 'NaCl'."""
    a: float = 0.0
    """Lattice constant of the crystal in Å. At 0, it is estimated from the sum of the covalent radii."""
    sites: dict[str, ListOf[str]] = Field(default_factory=dict)
    """Substitutes for each element of the prototype, by the symbol of that element."""
    repeat: Annotated[ListOf[PositiveInt], Field(min_length=3, max_length=3)] = (1, 1, 1)
    """Number of cells along each axis."""


class StrainSection(Section):
    """Strains that are applied to each substituted crystal."""

    volumes: Annotated[ListOf[PositiveFloat], Field(min_length=1)] = (1.0,)
    """Factors of the volume."""
    voigt: Annotated[ListOf[Annotated[ListOf[float], Field(min_length=6, max_length=6)]], Field(min_length=1)] = (
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    )
    """Strains as lists of six numbers, xx yy zz yz xz xy, with engineering shear."""


class GenerateSettings(Section):
    """A specification of generated structures."""

    prototypes: ListOf[PrototypeSection] = ()
    """Prototypes, each of which is combined with all its elements and strains."""
    strains: StrainSection = StrainSection()
    size: Literal["radii", "keep"] = "radii"
    """Size of the cell after a substitution: 'radii' scales it by the cube root of the sum of the cubes of the covalent
    radii (Cordero 2008), 'keep' leaves it as it is."""
    distinct: bool = True
    """Whether different sites get different elements."""

    @model_validator(mode="after")
    def _check_prototypes(self) -> GenerateSettings:
        if not self.prototypes:
            raise ValueError("there is no [[prototypes]].")
        names = [prototype.name for prototype in self.prototypes]
        if len(set(names)) < len(names):
            raise ValueError("two prototypes have the same name; give each its own.")
        return self


class Prototype:
    """One prototype with all its substitutions and strains, which are numbered from 0."""

    def __init__(self, section: PrototypeSection, settings: GenerateSettings, spec: Path) -> None:
        """Raise ConfigError for a prototype that cannot be built or elements that do not exist."""
        self.section, self.settings, self.where = section, settings, f"{spec}: prototype '{section.name}'"
        self.atoms = self._build(spec.parent)
        symbols = list(dict.fromkeys(self.atoms.get_chemical_symbols()))
        for site, elements in section.sites.items():
            if site not in symbols:
                raise ConfigError(f"{self.where} has no element '{site}'; it has {', '.join(symbols)}.")
            if not elements:
                raise ConfigError(f"{self.where}: sites.{site} names no element.")
            if len(set(elements)) < len(elements):
                raise ConfigError(f"{self.where}: sites.{site} names an element twice.")
            for element in elements:
                if element not in atomic_numbers or element == "X":
                    raise ConfigError(f"{self.where}: sites.{site}: '{element}' is not an element.")
        self.sites = list(section.sites)
        self._choices = self._substitutions()
        strains = prod([len(settings.strains.volumes), len(settings.strains.voigt)])
        if strains > 1 and not self.atoms.pbc.all():
            raise ConfigError(
                f"{self.where} is not periodic and cannot be strained; move it to a specification without [strains]."
            )
        self.n_strains = strains

    def __len__(self) -> int:
        return len(self._choices) * self.n_strains

    def _build(self, folder: Path) -> Atoms:
        section = self.section
        if bool(section.file) == bool(section.crystal):
            raise ConfigError(f"{self.where} must have either file or crystal.")
        try:
            if section.file:
                atoms = _last_structure(folder / section.file)
            else:
                lattice = section.a or self._estimated_lattice()
                atoms = bulk(section.formula, section.crystal, a=lattice, cubic=section.crystal in CUBIC)
            repeated: Atoms = atoms.repeat(section.repeat)  # type: ignore[union-attr]
            check_names(repeated.info)
            if any(conditions_of(repeated)):
                raise ValueError("its file states a charge or spin multiplicity, which generated structures lack")
            return repeated
        except Exception as error:  # ASE's readers and builders raise exceptions of many types
            raise ConfigError(f"{self.where} cannot be built ({error or type(error).__name__}).") from error

    def _estimated_lattice(self) -> float:
        counts = Formula(self.section.formula).count()
        radii = [covalent_radii[atomic_numbers[symbol]] for symbol in counts]
        return 2.0 * float(sum(radii)) if len(radii) > 1 else 2.8 * float(radii[0])

    def _substitutions(self) -> NDArray[np.int64]:
        """Return the numbers of all allowed substitutions, [N].

        A number has one digit per site, with the length of the site's list of elements as base.
        """
        lists = [self.section.sites[site] for site in self.sites]
        count = prod(len(elements) for elements in lists)
        if count > MAX_SUBSTITUTIONS:
            raise ConfigError(
                f"{self.where} has {count:,} substitutions, more than {MAX_SUBSTITUTIONS:,}; use several prototypes."
            )
        numbers = np.arange(count)
        if not self.settings.distinct or len(lists) < 2:
            return numbers
        digits = np.unravel_index(numbers, [len(elements) for elements in lists])
        chosen = [np.array([atomic_numbers[e] for e in names])[d] for names, d in zip(lists, digits, strict=True)]
        stacked = np.sort(np.stack(chosen), axis=0)
        return numbers[(np.diff(stacked, axis=0) != 0).all(axis=0)]

    def _choices_of(self, number: int) -> tuple[dict[str, str], int, int]:
        """Return the new elements by site, and the indices of the volume and of the strain, of a numbered structure."""
        choice, strain = divmod(number, self.n_strains)
        volume, shear = divmod(strain, len(self.settings.strains.voigt))
        lists = [self.section.sites[site] for site in self.sites]
        digits = np.unravel_index(self._choices[choice], [len(names) for names in lists]) if lists else ()
        new = {site: names[int(d)] for site, names, d in zip(self.sites, lists, digits, strict=True)}
        return new, volume, shear

    def name(self, number: int) -> str:
        """Return the name of a numbered structure: prototype, elements of the sites, volume and strain."""
        new, volume, shear = self._choices_of(number)
        return ":".join([self.section.name, *new.values(), f"v{self.settings.strains.volumes[volume]:g}", f"s{shear}"])

    def structure(self, number: int) -> Structure:
        """Return a numbered structure; raise StructureError if it is not valid."""
        new, volume, shear = self._choices_of(number)
        symbols = [new.get(symbol, symbol) for symbol in self.atoms.get_chemical_symbols()]
        atoms = self.atoms.copy()
        before = _radius(atoms.get_chemical_symbols())
        atoms.set_chemical_symbols(symbols)
        scale = _radius(symbols) / before if self.settings.size == "radii" else 1.0
        scale *= self.settings.strains.volumes[volume] ** (1 / 3)
        deformation = scale * (np.eye(3) + _strain(self.settings.strains.voigt[shear]))
        structure = Structure(
            numbers=atomic_numbers_of(atoms.numbers),
            positions=atoms.positions @ deformation.T,
            cell=atoms.cell[:] @ deformation.T,
            pbc=np.asarray(atoms.pbc, dtype=bool),
            constraints=tuple(atoms.constraints),
        )
        check_structure(structure)
        return structure


def _radius(symbols: list[str]) -> float:
    """Return the cube root of the sum of the cubes of the covalent radii, Å."""
    return float(np.cbrt((covalent_radii[[atomic_numbers[symbol] for symbol in symbols]] ** 3).sum()))


def _strain(voigt: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the symmetric strain [3, 3] of xx, yy, zz, yz, xz, xy, the last three as engineering shear."""
    xx, yy, zz, yz, xz, xy = voigt
    return np.array([[xx, xy / 2, xz / 2], [xy / 2, yy, yz / 2], [xz / 2, yz / 2, zz]])


class GeneratedSource:
    """All structures of a specification."""

    def __init__(self, spec: Path) -> None:
        """Raise ConfigError, with the key in its message, for a specification that cannot be used."""
        self.spec, settings = spec, load_generate_settings(spec)
        self.prototypes = [Prototype(section, settings, spec) for section in settings.prototypes]

    def items(self, first: int, selected: ChunkFilter) -> Items:
        """Yield items as `Source.items` does; structures of other chunks are not made."""
        index = first
        for prototype in self.prototypes:
            for number in self._numbers(index, len(prototype), selected):

                def read(prototype: Prototype = prototype, number: int = number) -> Structure:
                    return prototype.structure(number)

                name = f"{self.spec.name}#{prototype.name(number)}"
                yield Item(index=index + number, source_id=name, read=read)
            index += len(prototype)
        return index - first

    @staticmethod
    def _numbers(first: int, count: int, selected: ChunkFilter) -> Iterator[int]:
        """Yield the numbers below `count` that lie in the selected chunks if number 0 has the index `first`."""
        for chunk in range(first // CHUNK, -(-(first + count) // CHUNK)):
            if selected(chunk):
                begin, end = max(chunk * CHUNK - first, 0), min((chunk + 1) * CHUNK - first, count)
                yield from range(begin, end)

    def identity(self) -> str:
        """Return the digests of the specification and of the files that it names."""
        files = [self.spec.parent / each.section.file for each in self.prototypes if each.section.file]
        return " ".join([self.spec.name, *map(file_sha256, [self.spec, *files])])

    def known_length(self) -> int | None:
        """Return the number of combinations."""
        return sum(map(len, self.prototypes))


def _last_structure(path: Path) -> Atoms:
    """Return the last structure of a file, read as a source of a screen is; raise StructureError for a bad frame."""
    *_, frame = read_frames(path, GEOMETRY_ALONE)
    if frame.structure is None:
        raise frame.error or StructureError("unreadable", "the frame holds no structure")
    found = frame.structure
    return Atoms(
        found.numbers,
        positions=found.positions,
        cell=found.cell,
        pbc=found.pbc,
        info=dict(frame.info),
        constraint=list(found.constraints),
    )


def load_generate_settings(spec: Path) -> GenerateSettings:
    """Return the settings in a specification; raise ConfigError, with the key in its message, if they are not valid."""
    return parse_settings(GenerateSettings, read_toml(spec, "specification"), f"{spec}:")
