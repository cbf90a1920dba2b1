"""Reference energies: one energy per atom of each element, fitted to total energies or taken from isolated atoms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from hydrazero.shards.errors import SourceError

SAME_DIRECTION = 1e-10
"""Singular values below this fraction of the largest one are rounding errors."""


def reference_energies(triangle: NDArray[np.float64]) -> dict[str, float]:
    """Fit one energy per element (eV), in float64, from the triangular factor of the rows (compositions, energy).

    The factor R of a QR decomposition has the same least-squares problem as the rows themselves, and factors of parts
    of the rows can be stacked and factored again (tall-skinny QR, Demmel et al. 2012). Where the compositions do not
    determine the energies of single elements, the solution closest to the mean energy per atom is taken; its sums are
    right for every composition in the data. `undetermined_sums` returns for which others they are arbitrary.
    """
    counts, energies = triangle[:, :-1], triangle[:, -1]
    numbers = _numbers(counts)
    counts = counts[:, numbers]
    if not len(numbers):
        return {}  # a task without energies
    atoms = counts.sum(axis=1)
    # The mean energy per atom is subtracted first, so that the least-norm part is small and loses no digits.
    mean = float(np.dot(atoms, energies) / np.dot(atoms, atoms))
    correction, *_ = np.linalg.lstsq(counts, energies - mean * atoms, rcond=SAME_DIRECTION)
    return {chemical_symbols[z]: float(mean + c) for z, c in zip(numbers, correction, strict=True)}


def chosen_references(
    triangle: NDArray[np.float64], isolated: Mapping[str, float], way: str, task: str
) -> dict[str, float]:
    """Return the reference energies of a task in eV, by the way that the settings name: 'fit' or 'isolated'.

    `isolated` is element -> energy of its isolated atom. Raises SourceError if isolated atoms are chosen, but one of an
    element of the training split is missing.
    """
    fitted = reference_energies(triangle)
    if way == "fit":
        return fitted
    missing = [symbol for symbol in fitted if symbol not in isolated]
    if missing or not fitted:
        lacking = f"neutral isolated atom of {', '.join(missing)} with an energy" if missing else "energy"
        raise SourceError(
            f"task '{task}': references = 'isolated', but the training split holds no {lacking}; add it to the "
            "sources, or leave references at 'fit'."
        )
    return {symbol: isolated[symbol] for symbol in fitted}


def undetermined_sums(triangle: NDArray[np.float64]) -> list[dict[str, float]]:
    """Return the combinations of elements whose reference energies the compositions of the rows leave open.

    Each combination is element -> coefficient: a basis of the null space of the compositions, in reduced echelon form.
    Adding any multiple of it to the reference energies changes no sum over a composition in the data. A sum over
    another composition is determined if the composition is orthogonal to all combinations (`is_determined`).
    """
    numbers = _numbers(triangle[:, :-1])
    counts = triangle[:, numbers]
    if not len(numbers):
        return []
    _, sizes, directions = np.linalg.svd(counts, full_matrices=True)
    rank = int((sizes > SAME_DIRECTION * sizes.max(initial=0.0)).sum())
    basis = _echelon(directions[rank:].copy())
    return [
        {chemical_symbols[z]: round(float(c), 9) + 0.0 for z, c in zip(numbers, row, strict=True) if abs(c) > 1e-6}
        for row in basis
    ]


def _echelon(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return independent rows in reduced echelon form, which does not depend on the basis that they came in."""
    done = 0
    for column in range(rows.shape[1]):
        if done == len(rows):
            break
        pivot = done + int(np.argmax(np.abs(rows[done:, column])))
        if abs(rows[pivot, column]) < 1e-8:
            continue
        rows[[done, pivot]] = rows[[pivot, done]]
        rows[done] /= rows[done, column]
        others = np.arange(len(rows)) != done
        rows[others] -= np.outer(rows[others, column], rows[done])
        done += 1
    return rows


def is_determined(numbers: Iterable[int], undetermined: Iterable[Mapping[str, float]]) -> bool:
    """Return whether the sum of the reference energies of atoms with these atomic numbers is known from the data."""
    counts = np.bincount(list(numbers), minlength=119)
    tolerance = 1e-6 * max(int(counts.sum()), 1)
    return all(
        abs(sum(c * counts[atomic_numbers[symbol]] for symbol, c in combination.items())) <= tolerance
        for combination in undetermined
    )


def undetermined_text(undetermined: Sequence[Mapping[str, float]]) -> str:
    """Return which reference energies the data leave open, and what follows, without a full stop at the end."""
    symbols = sorted({symbol for combination in undetermined for symbol in combination}, key=atomic_numbers.__getitem__)
    named = " and ".join(filter(None, [", ".join(symbols[:-1]), *symbols[-1:]]))
    return (
        f"the compositions of the training structures do not determine the reference energies of {named} separately, "
        "so that total energies of other compositions are arbitrary, by any amount"
    )


def reference_table(references: Mapping[str, float]) -> NDArray[np.float64]:
    """Return energies in eV by atomic number, [119]; NaN for elements without one."""
    table = np.full(119, np.nan)
    for symbol, energy in references.items():
        table[atomic_numbers[symbol]] = energy
    return table


def _numbers(counts: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the atomic numbers that the rows hold."""
    return np.flatnonzero(np.abs(counts).max(axis=0, initial=0.0) > 0)
