"""Targets: quantities beside energy, forces and stress, of structures or atoms, any of which a structure may lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.errors import ConfigError, StructureError, did_you_mean
from hydrazero.shards.units import target_unit

KINDS = {"scalar": (), "vector": (3,)}
"""Kind -> shape of one value."""
OWNERS = ("structure", "atom")
RESERVED = ("energy", "forces", "stress", "spread", "charge", "multiplicity")

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
        if not name.isidentifier() or name in RESERVED:
            raise ConfigError(f"{place}: the name must be a word, and none of {', '.join(RESERVED)}.")
        for key, value, known in (("of", target.of, list(OWNERS)), ("kind", target.kind, list(KINDS))):
            if value not in known:
                raise ConfigError(f"{place}.{key} '{value}' is not known{did_you_mean(value, known)}.")
        if target.extensive and (target.of, target.kind) != ("structure", "scalar"):
            raise ConfigError(f"{place}.extensive is for scalars of structures alone.")
        target_unit(target.unit)


def target_value(name: str, target: TargetSection, value: Any, atoms: int) -> NDArray[np.float64] | None:
    """Convert one structure's value: shape (), (3,), [atoms] or [atoms, 3]; NaN where an atom lacks it; None if absent.

    Raises StructureError if it has another shape or is infinite.
    """
    if value is None:
        return None
    shape = (*((atoms,) if target.of == "atom" else ()), *KINDS[target.kind])
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StructureError(f"{name}_shape", f"the {name} cannot be read as numbers ({error})") from error
    if array.size != int(np.prod(shape)):
        raise StructureError(f"{name}_shape", f"the {name} has shape {array.shape}, not {shape}")
    array = array.reshape(shape) * target_unit(target.unit)[0]
    if np.isinf(array).any():
        raise StructureError(f"non_finite_{name}", f"the {name} is infinite")
    return None if np.isnan(array).all() else array
