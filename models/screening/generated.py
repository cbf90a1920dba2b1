"""Structures by substitution, made one by one and never stored: prototypes x elements x strains."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii
from ase.formula import Formula
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hydrazero.models.screening.settings import CHUNK
from hydrazero.models.screening.sources import Item, Items, Wanted
from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.files import read_toml
from hydrazero.shards.manifest import file_sha256
from hydrazero.shards.settings_parser import ListOf, Section, parse_settings
from hydrazero.shards.structure import Structure, check_structure

MOST_CHOICES = 20_000_000
"""Ways to put elements on the sites of one prototype; what is beyond is better split into several."""
CUBIC = ("sc", "fcc", "bcc", "diamond", "zincblende", "rocksalt", "fluorite", "cesiumchloride")
"""Crystals that are built as cubic cells; others as ASE has them."""


class PrototypeSection(Section):
    """A structure whose elements are exchanged."""

    name: str
    """Name of the prototype, which the names of its structures begin with."""
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
    """Elements that take the place of an element of the prototype, by that element."""
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
    """A complete specification of generated structures."""

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
    """One prototype with all its substitutions and strains, each by its number."""

    def __init__(self, section: PrototypeSection, settings: GenerateSettings, spec: Path) -> None:
        """Raise ConfigError for a prototype that cannot be built or elements that do not exist."""
        self.section, self.settings, self.where = section, settings, f"{spec}: prototype '{section.name}'"
        self.atoms = self._built(spec.parent)
        there = list(dict.fromkeys(self.atoms.get_chemical_symbols()))
        for site, elements in section.sites.items():
            if site not in there:
                raise ConfigError(f"{self.where} has no element '{site}'{did_you_mean(site, there)}.")
            if not elements:
                raise ConfigError(f"{self.where}: sites.{site} names no element.")
            if len(set(elements)) < len(elements):
                raise ConfigError(f"{self.where}: sites.{site} names an element twice.")
            for element in elements:
                if element not in atomic_numbers or element == "X":
                    raise ConfigError(f"{self.where}: sites.{site}: '{element}' is no element.")
        self.sites = list(section.sites)
        self._choices = self._possible()
        strained = prod([len(settings.strains.volumes), len(settings.strains.voigt)])
        if strained > 1 and not self.atoms.pbc.all():
            raise ConfigError(f"{self.where} is not periodic and cannot be strained; leave [strains] out for it.")
        self.strained = strained

    def __len__(self) -> int:
        return len(self._choices) * self.strained

    def _built(self, folder: Path) -> Atoms:
        section = self.section
        if bool(section.file) == bool(section.crystal):
            raise ConfigError(f"{self.where} must have either file or crystal.")
        try:
            if section.file:
                atoms = ase.io.read(folder / section.file, index=-1)
            else:
                lattice = section.a or self._guessed_lattice()
                atoms = bulk(section.formula, section.crystal, a=lattice, cubic=section.crystal in CUBIC)
            repeated: Atoms = atoms.repeat(section.repeat)  # type: ignore[union-attr]
            return repeated
        except Exception as error:  # ASE's readers and builders raise whatever goes wrong in them
            raise ConfigError(f"{self.where} cannot be built ({error or type(error).__name__}).") from error

    def _guessed_lattice(self) -> float:
        counts = Formula(self.section.formula).count()
        radii = [covalent_radii[atomic_numbers[symbol]] for symbol in counts]
        return 2.0 * float(sum(radii)) if len(radii) > 1 else 2.8 * float(radii[0])

    def _possible(self) -> NDArray[np.int64]:
        """Numbers of the substitutions, in the mixed radix of the sites' lists, that are wanted."""
        lists = [self.section.sites[site] for site in self.sites]
        count = prod(len(elements) for elements in lists)
        if count > MOST_CHOICES:
            raise ConfigError(
                f"{self.where} has {count:,} substitutions, more than {MOST_CHOICES:,}; split it into several."
            )
        numbers = np.arange(count)
        if not self.settings.distinct or len(lists) < 2:
            return numbers
        digits = np.unravel_index(numbers, [len(elements) for elements in lists])
        chosen = [np.array([atomic_numbers[e] for e in names])[d] for names, d in zip(lists, digits, strict=True)]
        stacked = np.sort(np.stack(chosen), axis=0)
        return numbers[(np.diff(stacked, axis=0) != 0).all(axis=0)]

    def _parts(self, number: int) -> tuple[dict[str, str], int, int]:
        """What is put on each site, and which volume and strain, of the structure of a number."""
        choice, strain = divmod(number, self.strained)
        volume, shear = divmod(strain, len(self.settings.strains.voigt))
        lists = [self.section.sites[site] for site in self.sites]
        digits = np.unravel_index(self._choices[choice], [len(names) for names in lists]) if lists else ()
        new = {site: names[int(d)] for site, names, d in zip(self.sites, lists, digits, strict=True)}
        return new, volume, shear

    def name(self, number: int) -> str:
        """Name of the structure of a number: prototype, elements of the sites, volume, strain."""
        new, volume, shear = self._parts(number)
        return ":".join([self.section.name, *new.values(), f"v{self.settings.strains.volumes[volume]:g}", f"s{shear}"])

    def structure(self, number: int) -> Structure:
        """Make the structure of a number; raises StructureError if it cannot be right."""
        new, volume, shear = self._parts(number)
        symbols = [new.get(symbol, symbol) for symbol in self.atoms.get_chemical_symbols()]
        atoms = self.atoms.copy()
        before = _radius(atoms.get_chemical_symbols())
        atoms.set_chemical_symbols(symbols)
        scale = _radius(symbols) / before if self.settings.size == "radii" else 1.0
        scale *= self.settings.strains.volumes[volume] ** (1 / 3)
        deformation = scale * (np.eye(3) + _strain(self.settings.strains.voigt[shear]))
        structure = Structure(
            numbers=atoms.numbers.astype(np.uint8),
            positions=atoms.positions @ deformation.T,
            cell=atoms.cell[:] @ deformation.T,
            pbc=np.asarray(atoms.pbc, dtype=bool),
        )
        check_structure(structure)
        return structure


def _radius(symbols: list[str]) -> float:
    """Cube root of the sum of the cubes of covalent radii, Å."""
    return float(np.cbrt((covalent_radii[[atomic_numbers[symbol] for symbol in symbols]] ** 3).sum()))


def _strain(voigt: tuple[float, ...]) -> NDArray[np.float64]:
    """Symmetric strain [3, 3] from xx yy zz yz xz xy with engineering shear."""
    xx, yy, zz, yz, xz, xy = voigt
    return np.array([[xx, xy / 2, xz / 2], [xy / 2, yy, yz / 2], [xz / 2, yz / 2, zz]])


class GeneratedSource:
    """All structures of a specification."""

    def __init__(self, spec: Path) -> None:
        """Raise ConfigError, naming the key, for a specification that cannot be used."""
        self.spec, settings = spec, load_generate_settings(spec)
        self.prototypes = [Prototype(section, settings, spec) for section in settings.prototypes]

    def items(self, first: int, wanted: Wanted) -> Items:
        """See Source; what is not wanted is not made."""
        index = first
        for prototype in self.prototypes:
            for number in self._wanted(index, len(prototype), wanted):

                def read(prototype: Prototype = prototype, number: int = number) -> Structure:
                    return prototype.structure(number)

                name = f"{self.spec.name}#{prototype.name(number)}"
                yield Item(index=index + number, source_id=name, read=read)
            index += len(prototype)
        return index - first

    @staticmethod
    def _wanted(first: int, count: int, wanted: Wanted) -> Iterator[int]:
        """Numbers below `count` that lie in wanted chunks."""
        for chunk in range(first // CHUNK, -(-(first + count) // CHUNK)):
            if wanted(chunk):
                begin, end = max(chunk * CHUNK - first, 0), min((chunk + 1) * CHUNK - first, count)
                yield from range(begin, end)

    def identity(self) -> str:
        """Digests of the specification and the files that it names."""
        files = [self.spec.parent / each.section.file for each in self.prototypes if each.section.file]
        return " ".join([self.spec.name, *map(file_sha256, [self.spec, *files])])

    def known_length(self) -> int | None:
        """By arithmetic."""
        return sum(map(len, self.prototypes))


def load_generate_settings(spec: Path) -> GenerateSettings:
    """Read a specification; raises ConfigError, naming the key."""
    return parse_settings(GenerateSettings, read_toml(spec, "specification"), f"{spec}:")
