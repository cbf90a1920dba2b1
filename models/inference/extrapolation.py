"""Warnings that a structure lies outside of the training data of a task."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
from ase.symbols import Symbols
from numpy.typing import NDArray

from hydrazero.models.inference.short_distances import ShortDistances, ShortPair, bounds_table
from hydrazero.models.inference.user_warnings import ModelWarning, warn_user
from hydrazero.models.task_facts import UNTRAINED, TaskFacts
from hydrazero.shards.convert.references import is_determined, undetermined_text
from hydrazero.shards.graphs.graph import GraphSample
from hydrazero.shards.graphs.neighbours import HalfPairs
from hydrazero.shards.structure import FloatArray, Structure


class ExtrapolationWarning(ModelWarning):
    """A prediction for a structure unlike those that the task was trained on."""


def ignored_conditions(facts: TaskFacts, structure: Structure, name: str, unread: str | None = None) -> str | None:
    """Return what a task ignores in the charge and spin of a structure, None if that is nothing.

    `name` is that of the structure in the sentence, `unread` a charge or spin of it under a name that is not read. A
    spin multiplicity of 1 or 2 is what a structure without charge has at least, and is not reported.
    """
    charge, multiplicity = structure.charge, structure.multiplicity
    if facts.charge_spin or (charge == 0 and multiplicity <= 2 and unread is None):
        return None
    what = [f"charge {charge:+d}"] * (charge != 0) + [f"spin multiplicity {multiplicity}"] * (multiplicity > 2)
    what += [] if unread is None else [unread]
    return (
        f"task '{facts.name}' ignores the {' and '.join(what)} of {name}: its head does not depend on charge and spin"
    )


def undetermined_energy(facts: TaskFacts, numbers: NDArray[np.uint8], name: str) -> str | None:
    """Return why the total energy of atoms with these atomic numbers is arbitrary, None if it is not.

    `name` is that of the structure in the sentence.
    """
    sums = facts.undetermined_sums
    if not facts.has_energy or not sums or is_determined(numbers.tolist(), sums):
        return None
    return f"task '{facts.name}' predicts an arbitrary energy for {name}: {undetermined_text(sums)}"


def warn_of_short_distances(short: ShortDistances, samples: Sequence[GraphSample], said: set[str]) -> None:
    """Warn of the first sample with atoms closer than in the training data of a task, for tasks not in `said`.

    The tasks that are warned of are added to `said`.
    """
    for pair in short.of_samples(samples):
        facts = short.tasks[pair.task]
        if facts.name not in said:
            said.add(facts.name)
            name = samples[pair.structure].structure.source_id
            warn_user(f"{pair.text(facts, name)}.", ExtrapolationWarning)


def formula_of(numbers: NDArray[np.uint8]) -> str:
    """Return the chemical formula of atoms; it is kept, since making it takes milliseconds for thousands of atoms."""
    return _formula(numbers.tobytes())


@lru_cache(maxsize=1024)
def _formula(numbers: bytes) -> str:
    return str(Symbols(np.frombuffer(numbers, dtype=np.uint8)).get_chemical_formula())


class Extrapolation:
    """Checks structures of one task and warns once for each kind of extrapolation and each formula."""

    def __init__(self, facts: TaskFacts, cutoff: float) -> None:
        """Create a check; pairs farther apart than `cutoff` in Å are ignored."""
        self.facts = facts
        self._bounds = bounds_table(facts, cutoff)
        self._said: set[tuple[str, str, str]] = set()

    def bounds(self, numbers: NDArray[np.uint8], pairs: HalfPairs) -> FloatArray:
        """Return the smallest distance in the training data for each pair of elements in Å, [P]; 0 if it is unknown."""
        found: FloatArray = self._bounds[numbers[pairs.first], numbers[pairs.second]]
        return found

    def look_at_distances(
        self, formula: str, numbers: NDArray[np.uint8], pairs: HalfPairs, distances: FloatArray, bounds: FloatArray
    ) -> None:
        """Warn about pairs [P] with `distances` [P] in Å below all distances of their elements in the training data."""
        short = np.flatnonzero(distances < bounds)
        if not len(short):
            return
        worst = int(short[np.argmin(distances[short] / bounds[short])])
        first, second = sorted((int(pairs.first[worst]), int(pairs.second[worst])))
        pair = ShortPair(
            structure=0,
            task=0,
            atoms=(first, second),
            numbers=(int(numbers[first]), int(numbers[second])),
            distance=float(distances[worst]),
        )
        self.look_at_pair(formula, pair)

    def look_at_pair(self, formula: str, pair: ShortPair) -> None:
        """Warn about a pair that is closer than all pairs of its elements in the training data."""
        self._warn("distance", formula, pair.text(self.facts, formula))

    def look_at_composition(self, formula: str, numbers: NDArray[np.uint8]) -> None:
        """Warn about a composition whose total energy the training data does not determine."""
        if (text := undetermined_energy(self.facts, numbers, formula)) is not None:
            self._warn("composition", formula, text)

    def look_at_untrained(self, formula: str, wanted: Collection[str]) -> None:
        """Warn about those of the wanted 'forces' and 'stress' that are predicted, but were not trained."""
        for name in self.facts.untrained:
            if name in wanted:
                verb, what = "are" if name == "forces" else "is", UNTRAINED[getattr(self.facts, name)]
                predicted = f"the {name} that task '{self.facts.name}' predicts for {formula}"
                self._warn(name, formula, f"{predicted} {verb} {what}")

    def look_at_spread(self, formula: str, per_atom: float) -> None:
        """Warn if the spread of the ensemble in eV per atom exceeds that of 99% of the evaluated structures."""
        if 0.0 < self.facts.largest_spread < per_atom:
            self._warn(
                "spread",
                formula,
                f"the ensemble of task '{self.facts.name}' disagrees by {1000 * per_atom:.3g} meV per atom on "
                f"{formula}; it disagrees by less than {1000 * self.facts.largest_spread:.3g} on 99% of the structures "
                "that it was evaluated on",
            )

    def look_at_conditions(self, formula: str, structure: Structure, unread: str | None = None) -> None:
        """Warn about a charge or spin that the task ignores; `unread` is one under a name that is not read."""
        if (text := ignored_conditions(self.facts, structure, formula, unread)) is not None:
            self._warn("conditions", formula, text)

    def look_at_other(self, formula: str, task: str, reason: str) -> None:
        """Warn that another task is left out; the reason follows the formula of the structure."""
        self._warn(f"task {task}", formula, f"{formula} {reason}; the task is left out of the comparison")

    def _warn(self, kind: str, formula: str, text: str) -> None:
        place = (self.facts.name, kind, formula)
        if place not in self._said:
            self._said.add(place)
            warn_user(f"{text}.", ExtrapolationWarning)
