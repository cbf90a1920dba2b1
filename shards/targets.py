"""Targets: quantities of structures or atoms other than energy, forces and stress; a structure may lack any of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from hydrazero.shards.errors import StructureError
from hydrazero.shards.settings_parser import STRICT, Section
from hydrazero.shards.structure import MAX_MAGNITUDE
from hydrazero.shards.units import target_unit

KINDS = {"scalar": (), "vector": (3,)}
"""Kind -> shape of one value."""
RESERVED = ("energy", "free_energy", "energy_spread", "forces", "stress", "spread", "charge", "multiplicity")

STRUCTURE_PREFIX, ATOM_PREFIX = "target.", "atom_target."
"""Prefixes of the names of columns of a block that hold targets."""


class TargetSection(Section):
    """A table [targets.NAME] of a conversion file: a further quantity that is taken over from the source."""

    field: str
    """Where the source holds the quantity: a field or array of a frame, or a name under [columns]."""
    of: Literal["structure", "atom"] = "structure"
    """Whether the quantity belongs to the 'structure' or to each 'atom'."""
    kind: Literal["scalar", "vector"] = "scalar"
    """'scalar', or 'vector' for three components that turn with the structure."""
    unit: str = ""
    """Unit in the source: one of energies (see `units.energy`), 'e', 'muB', 'e*Angstrom', 'e*Bohr', 'Debye',
    'Angstrom^3' or 'Bohr^3'; values are converted into eV, e, eÅ, µB or Å³. It stays empty for a quantity without a
    unit."""
    extensive: bool = False
    """For a scalar of structures: whether it is a sum over atoms, such as a polarizability, or a property of the whole
    structure, such as a band gap."""
    absolute: bool = False
    """For a scalar: whether only its absolute value is taken over. The sign of a collinear magnetic moment, for
    example, depends on the choice of a spin axis, which no model can know from the geometry."""
    optional: bool = False
    """Whether the sources may lack the quantity altogether. The task is then converted without it; otherwise that is an
    error."""

    @field_validator("unit")
    @classmethod
    def _check_unit(cls, unit: str) -> str:
        target_unit(unit)
        return unit

    @model_validator(mode="after")
    def _check_kind(self) -> TargetSection:
        if self.extensive and (self.of, self.kind) != ("structure", "scalar"):
            raise ValueError("extensive is for scalars of structures alone.")
        if self.absolute and self.kind != "scalar":
            raise ValueError("absolute is for scalars alone.")
        return self

    @property
    def column(self) -> str:
        """Prefix of the name of its column in a block."""
        return ATOM_PREFIX if self.of == "atom" else STRUCTURE_PREFIX


def check_target_name(name: str) -> str:
    """Return the name of a target; raises ValueError for a name that a batch cannot hold."""
    # A batch has target_NAME and target_NAME_mask, which must not be another target's.
    if not name.isidentifier() or name in RESERVED or name.endswith("_mask"):
        raise ValueError(f"the name must be a word without '_mask', and none of {', '.join(RESERVED)}.")
    return name


TargetName = Annotated[str, AfterValidator(check_target_name)]
"""The name of a target."""


def internal_unit(unit: str) -> str:
    """Return a unit that targets have in shards and models; raises ValueError for any other."""
    if target_unit(unit) != (1.0, unit):
        raise ValueError(f"'{unit}' is not a unit that targets are converted into.")
    return unit


@dataclass(frozen=True, kw_only=True)
class TargetStatistics:
    """Statistics of a target in a manifest; the numbers are those of the training split."""

    __pydantic_config__ = STRICT

    of: Annotated[str, Field(pattern="^(structure|atom)$")]
    kind: Annotated[str, Field(pattern="^(scalar|vector)$")]
    unit: Annotated[str, AfterValidator(internal_unit)]
    """Internal unit: eV, e, eÅ, µB, Å³, or empty."""
    extensive: bool
    count: PositiveInt
    """Number of values; each component of a vector counts."""
    minimum: float
    maximum: float
    mean: float
    """Mean, per atom for an extensive target; 0 for a vector."""
    deviation: NonNegativeFloat
    """Standard deviation, per atom for an extensive target."""


@dataclass(frozen=True, kw_only=True)
class TargetColumn:
    """A target that the batches of a stream contain."""

    name: str
    of: str
    kind: str


def target_value(name: str, target: TargetSection, value: Any, atoms: int) -> NDArray[np.float64] | None:
    """Return a target of one structure in its internal unit, or None if the structure lacks it.

    The shape is (), (3,), [atoms] or [atoms, 3], with NaN for atoms that lack the target. Axes of length one in `value`
    are ignored, and vectors of atoms may be a flat list. A vector with a component that is NaN counts as absent. Raises
    StructureError for any other shape, and for values that are infinite or too large to be right.
    """
    if value is None:
        return None
    shape = (*((atoms,) if target.of == "atom" else ()), *KINDS[target.kind])
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StructureError(f"{name}_shape", f"the {name} cannot be read as numbers ({error})") from error
    # Counting numbers is not enough: [3, atoms] has as many as [atoms, 3].
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
