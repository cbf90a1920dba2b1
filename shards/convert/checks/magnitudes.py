"""Whether the magnitudes of energies, forces and stresses are possible, and equal in all frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.readers.frames import SourceUnits
from hydrazero.shards.structure import FloatArray
from hydrazero.shards.units import energy_factor, force_factor, stress_factor

HARTREE = energy_factor("Hartree")

LARGE_STRESS, IMPOSSIBLE_STRESS = 1.0, 5.0
"""Stresses in eV/Å³ that half of the structures, and any structure, should not exceed: 160 and 800 GPa."""
USUAL_STRESS = (1e-3, 0.3)
"""Range in eV/Å³ in which a unit should bring the median stress."""
LARGE_FORCE = 10.0
"""Force in eV/Å that half of the atoms should not exceed."""
TOO_LOW = 1.3
"""Ratio to the energy of all electrons of the atoms that no total energy exceeds; relativity adds up to a tenth."""
SAME_ENERGY = 0.04
"""Relative difference from the energy of all electrons up to which a unit is named."""
LOWEST_HYDROGEN = -30.0
"""Energy in eV that an atom of hydrogen can add to a total energy, and twice as much as it does."""
LIGHT = 36
"""Largest atomic number for which the formula of the energy of all electrons is that exact."""

RATIOS = {
    "Hartree and eV": energy_factor("Hartree"),
    "Rydberg and eV": energy_factor("Ry"),
    "eV and kcal/mol": 1 / energy_factor("kcal/mol"),
    "eV and kJ/mol": 1 / energy_factor("kJ/mol"),
    "Hartree and kcal/mol": energy_factor("Hartree") / energy_factor("kcal/mol"),
    "Hartree and kJ/mol": energy_factor("Hartree") / energy_factor("kJ/mol"),
    "eV and meV": 1000.0,
}
"""Ratios of energies that differ in their unit alone."""


@dataclass(frozen=True, kw_only=True)
class EnergySample:
    """Energies of some structures of a task."""

    counts: FloatArray
    """Number of atoms of each element 0 to 118, [structures, 119]."""
    energies: FloatArray
    """Total energies in eV, [structures]."""
    names: list[str]
    """Source ids of the structures."""
    every: int
    """One of so many structures of the sources is in the sample."""

    @property
    def shown(self) -> str:
        """What the sample consists of, as words."""
        whole = f"{len(self.energies):,} structures"
        return whole if self.every == 1 else f"{whole} that were looked at"


def energy_warnings(sample: EnergySample, units: SourceUnits) -> list[str]:
    """Return sentences about energies that are too low, or of another order of magnitude in a part of the frames."""
    found = [_all_electrons(sample, units), _hydrogen(sample, units), _per_atom(sample) or _parts(sample)]
    return [text for text in found if text is not None]


def all_electron_energies() -> FloatArray:
    """Return the total energy of each neutral atom with all electrons in eV, [119], within 3% up to krypton.

    These are the first terms of the statistical theory of atoms (Schwinger 1981, doi:10.1103/PhysRevA.24.2353), without
    relativity.
    """
    z = np.arange(119, dtype=np.float64)
    energies: FloatArray = -HARTREE * (0.768745 * z ** (7 / 3) - 0.5 * z**2 + 0.269900 * z ** (5 / 3))
    return energies


def _all_electrons(sample: EnergySample, units: SourceUnits) -> str | None:
    """Compare energies with those of all electrons: none is lower, and energies of all-electron codes are close."""
    if not len(sample.energies):
        return None
    limits = sample.counts @ all_electron_energies()
    ratios = sample.energies / limits
    ratio = float(np.median(ratios))
    factor = energy_factor(units.energy)
    close = {
        name: abs(ratio * energy_factor(name) / factor - 1)
        for name in ("Hartree", "Ry", "eV", "kcal/mol", "kJ/mol", "meV")
        if abs(energy_factor(name) / factor - 1) > SAME_ENERGY
    }
    unit = min(close, key=lambda name: close[name])
    named = close[unit] < SAME_ENERGY
    at = sample.names[int(np.argmin(np.abs(ratios - ratio)))]
    if ratio > TOO_LOW:
        reason = f"they are probably in {unit}" if named else "their unit is probably a smaller one"
        return (
            f"the energies are too low to be in {units.energy}: that of {at} is {ratio:.3g} times the all-electron "
            f"energy of its atoms; {reason}; look at units.energy."
        )
    present = np.flatnonzero(sample.counts.sum(axis=0))
    narrow = np.ptp(np.quantile(ratios, (0.1, 0.9))) < SAME_ENERGY * ratio
    if named and narrow and 2 < present.max() <= LIGHT and abs(ratio - 1) > SAME_ENERGY:
        return (
            f"the energies are probably in {unit}, not in {units.energy}: in {unit}, that of {at} is the energy of its "
            "atoms with all their electrons; look at units.energy."
        )
    return None


def _hydrogen(sample: EnergySample, units: SourceUnits) -> str | None:
    """Find energies in a small unit by what they say of hydrogen, which has only one electron."""
    used = np.flatnonzero(sample.counts.any(axis=0))
    if 1 not in used or len(sample.energies) <= len(used):
        return None
    atoms = sample.counts.sum(axis=1)
    solution, _, _, sizes = np.linalg.lstsq(
        sample.counts[:, used] / atoms[:, None], sample.energies / atoms, rcond=None
    )
    hydrogen = float(solution[used.tolist().index(1)])
    if sizes.min() < 0.01 * sizes.max() or hydrogen > LOWEST_HYDROGEN:
        return None
    return (
        f"the energies are improbable: each atom of hydrogen lowers the energy by {-hydrogen:.3g} eV on average, while "
        f"it cannot lower it by more than {-LOWEST_HYDROGEN:g} eV; they are probably not in {units.energy} but, for "
        f"example, in {_smaller(units)}; look at units.energy."
    )


def _smaller(units: SourceUnits) -> str:
    """Return a usual unit of energy that is smaller than that of the settings."""
    smaller = (
        name for name in ("kcal/mol", "kJ/mol", "meV") if energy_factor(name) < 0.9 * energy_factor(units.energy)
    )
    return next(smaller, "a smaller unit")


def _per_atom(sample: EnergySample) -> str | None:
    """Find energies per atom that are taken for total energies, by energies that do not grow with the structure."""
    atoms = sample.counts.sum(axis=1)
    if len(atoms) < 8:
        return None
    larger = np.maximum(atoms / np.median(atoms), np.median(atoms) / atoms)
    others = larger >= 2  # structures of quite another size than most
    if others.sum() < 3 or not sample.energies[others].all():
        return None
    widths = []
    for counts in (sample.counts / atoms[:, None], sample.counts):
        away = np.abs(sample.energies - _robust_sums(counts, sample.energies))[others]
        widths.append(float(np.median(away / np.abs(sample.energies[others]))))
    if widths[0] > 0.15 or widths[1] < 3 * widths[0]:
        return None
    return (
        "the energies do not grow with the number of atoms, as if they were energies per atom; set energy_per_atom = "
        "true."
    )


def _parts(sample: EnergySample) -> str | None:
    """Find frames whose energies differ from those of similar atoms by the ratio of two units, or by their number."""
    atoms = sample.counts.sum(axis=1)
    larger = atoms >= 3  # energies of atoms and dimers may be far from those of larger structures
    if larger.sum() < 8:
        return None
    expected = _robust_sums(sample.counts, sample.energies)
    ratios = np.divide(sample.energies, expected, out=np.full(len(atoms), np.nan), where=expected != 0)
    usual = np.abs(ratios - 1) < 0.3
    width = float(np.median(np.abs(ratios[larger & usual] - 1))) if (larger & usual).any() else np.inf
    if np.mean(usual[larger]) < 0.55:
        return None
    tolerance = float(np.clip(4.5 * width, 0.03, 0.2))
    strange = larger & (np.abs(ratios - 1) > 0.5)
    for reason, matches in _explained(ratios, atoms, strange, tolerance).items():
        if matches.sum() > (strange & ~matches).sum():
            high = bool(ratios[matches][0] > 1)  # those that are not quite in the ratio belong to them
            return _said(sample, strange & (ratios > 0) & ((ratios > 1) == high), ratios, reason)
    far = strange & (ratios > 10)  # repulsion in a dense structure explains a large energy of the opposite sign
    return _said(sample, far, ratios, "which no change of the geometry explains") if far.any() and width < 0.1 else None


def _explained(
    ratios: FloatArray, atoms: FloatArray, strange: NDArray[np.bool_], tolerance: float
) -> dict[str, NDArray[np.bool_]]:
    found = {}
    for units, factor in RATIOS.items():
        high, low = (np.abs(ratios * by - 1) < tolerance for by in (1 / factor, factor))
        found[f"the ratio of {units}"] = strange & (high | low)
    found["as if they were divided by the number of atoms"] = (
        strange & (atoms > 3) & (np.abs(ratios * atoms - 1) < tolerance)
    )
    return dict(sorted(found.items(), key=lambda item: -int(item[1].sum())))


def _said(sample: EnergySample, rows: NDArray[np.bool_], ratios: FloatArray, reason: str) -> str:
    first = int(np.flatnonzero(rows)[0])
    return (
        f"the energies of {int(rows.sum()):,} of {sample.shown} are of another order of magnitude: that of "
        f"{sample.names[first]} is {ratios[first]:.3g} times what the others suggest for its atoms, {reason}; convert "
        "such structures separately, or leave them out."
    )


def _robust_sums(counts: FloatArray, energies: FloatArray) -> FloatArray:
    """Return the sums over atoms of energies of the elements that are fitted with the least absolute deviations."""
    used = counts[:, counts.any(axis=0)]
    atoms = used.sum(axis=1)
    weights = 1 / atoms
    sums = energies
    for _ in range(30):  # least squares with other weights each time
        solution, *_ = np.linalg.lstsq(used * weights[:, None], energies * weights, rcond=1e-8)
        sums = used @ solution
        away = np.abs(energies - sums) / atoms
        weights = 1 / (atoms * np.sqrt(np.maximum(away, 1e-6 + 1e-3 * float(np.median(away)))))
    return sums


def stress_warning(median: float, largest: float, where: str, units: SourceUnits) -> str | None:
    """Return a sentence about stresses (eV/Å³) that are too large: their median, and the largest one, of `where`."""
    if not (median > LARGE_STRESS or largest > IMPOSSIBLE_STRESS):
        return None
    gigapascal = 1 / stress_factor("GPa")
    factor = abs(stress_factor(units.stress))
    value = median if median > LARGE_STRESS else largest
    low, high = USUAL_STRESS if median > LARGE_STRESS else (USUAL_STRESS[0], IMPOSSIBLE_STRESS)
    likely = [name for name in ("GPa", "kbar", "bar") if low < value * stress_factor(name) / factor < high]
    half = f", and half of the stresses that are not zero exceed {median:.3g}" if median > LARGE_STRESS else ""
    reason = f" (as if it were in {' or '.join(likely)})" if likely else ""
    return (
        f"the stress of {where} is {largest:.3g} eV/Å³, which is {gigapascal * largest:,.0f} GPa{half}; the unit "
        f"'{units.stress}' is probably wrong{reason}, in all or in part of the frames; look at units.stress."
    )


def force_warning(median: float, units: SourceUnits) -> str | None:
    """Return a sentence about forces whose median norm (eV/Å) is too large."""
    if median <= LARGE_FORCE:
        return None
    usual = ("eV/Angstrom", "kcal/mol/Angstrom", "kJ/mol/Angstrom", "meV/Angstrom")
    smaller = [name for name in usual if force_factor(name) < 0.9 * abs(force_factor(units.forces))]
    example = f" but, for example, in {smaller[0]}" if smaller else ""
    return (
        f"half of the forces exceed {median:.3g} eV/Å, which is rare even in hot liquids; they are probably not in "
        f"{units.forces}{example}; look at units.forces and units.energy."
    )


def median_of(counts: NDArray[np.int64], edges: NDArray[np.float64]) -> float:
    """Return the median of a histogram, as the upper edge of its bin; 0 for an empty one."""
    if not counts.sum():
        return 0.0
    return float(edges[1 + int(np.searchsorted(np.cumsum(counts), 0.5 * counts.sum()))])
