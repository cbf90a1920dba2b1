"""Targets: quantities beside energy, forces and stress, of structures or atoms, any of which a structure may lack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.errors import ConfigError, SourceError, StructureError, did_you_mean
from hydrazero.shards.structure import MAX_MAGNITUDE
from hydrazero.shards.units import target_unit

KINDS = {"scalar": (), "vector": (3,)}
"""Kind -> shape of one value."""
OWNERS = ("structure", "atom")
RESERVED = ("energy", "free_energy", "energy_spread", "forces", "stress", "spread", "charge", "multiplicity")

STRUCTURE_PREFIX, ATOM_PREFIX = "target.", "atom_target."
"""Of the columns of a block that hold targets."""


@dataclass(frozen=True, kw_only=True)
class TargetSection:
    """A table [targets.NAME] of the settings of a conversion."""

    field: str
    """Where the source has it: a field or array of a frame, or a name under [columns]."""
    of: str = "structure"
    """'structure' or 'atom'."""
    kind: str = "scalar"
    """'scalar', or 'vector' of three components."""
    unit: str = ""
    """Of the source; converted into eV, e, eÅ, µB or Å³."""
    extensive: bool = False
    """Of a structure's scalar: whether it is a sum over atoms (a polarizability), or of the whole (a band gap)."""
    absolute: bool = False
    """Of a scalar: whether its size alone is taken over. The sign of a collinear magnetic moment is the choice of a
    spin axis, which no model can tell from the geometry."""
    optional: bool = False
    """Whether the sources may lack it altogether: the task is then without it, where it would be an error."""

    @property
    def column(self) -> str:
        """Prefix of its column in a block."""
        return ATOM_PREFIX if self.of == "atom" else STRUCTURE_PREFIX


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """What a manifest tells of a target; numbers are of the training split."""

    of: str
    kind: str
    unit: str
    """The internal one."""
    extensive: bool
    count: int
    """Values: components of structures or atoms that have it."""
    minimum: float
    maximum: float
    mean: float
    """Per atom if extensive; 0 for a vector."""
    deviation: float
    """Root mean square distance from the mean, per atom if extensive."""


@dataclass(frozen=True, kw_only=True)
class TargetColumn:
    """A target that batches of a stream shall hold."""

    name: str
    of: str
    kind: str


def check_targets(targets: Mapping[str, TargetSection], where: str) -> None:
    """Raise ConfigError for a target whose name, kind or unit cannot be."""
    for name, target in targets.items():
        place = f"{where} targets.{name}"
        # A batch has target_NAME and target_NAME_mask, which must not be another target's.
        if not name.isidentifier() or name in RESERVED or name.endswith("_mask"):
            raise ConfigError(f"{place}: the name must be a word without '_mask', and none of {', '.join(RESERVED)}.")
        for key, value, known in (("of", target.of, list(OWNERS)), ("kind", target.kind, list(KINDS))):
            if value not in known:
                raise ConfigError(f"{place}.{key} '{value}' is not known{did_you_mean(value, known)}.")
        if target.extensive and (target.of, target.kind) != ("structure", "scalar"):
            raise ConfigError(f"{place}.extensive is for scalars of structures alone.")
        if target.absolute and target.kind != "scalar":
            raise ConfigError(f"{place}.absolute is for scalars alone.")
        try:
            target_unit(target.unit)
        except SourceError as error:
            raise ConfigError(f"{place}.unit: {error}") from error


def target_value(name: str, target: TargetSection, value: Any, atoms: int) -> NDArray[np.float64] | None:
    """Convert one structure's value: shape (), (3,), [atoms] or [atoms, 3]; NaN where an atom lacks it; None if absent.

    Axes of length one don't matter, and a vector of atoms may be one flat list, as tables have it; a vector of which a
    component is NaN is absent. Raises StructureError for any other shape, and for a value that is infinite or too large
    to be right.
    """
    if value is None:
        return None
    shape = (*((atoms,) if target.of == "atom" else ()), *KINDS[target.kind])
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StructureError(f"{name}_shape", f"the {name} cannot be read as numbers ({error})") from error
    # Numbers alone don't do: [3, atoms] has as many as [atoms, 3].
    if _without_ones(array.shape) != _without_ones(shape) and array.shape != (math.prod(shape),):
        raise StructureError(f"{name}_shape", f"the {name} has shape {array.shape}, not {shape}")
    array = array.reshape(shape) * target_unit(target.unit)[0]
    if (np.abs(array) > MAX_MAGNITUDE).any():
        raise StructureError(f"non_finite_{name}", f"the {name} is infinite or above {MAX_MAGNITUDE:.0e}")
    if target.kind == "vector":
        array[np.isnan(array).any(axis=-1)] = np.nan
    if target.absolute:
        array = np.abs(array)
    return None if np.isnan(array).all() else array


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
