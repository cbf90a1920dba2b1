"""Isolated atoms that a conversion leaves out although they would determine the reference energies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ase.data import chemical_symbols

from hydrazero.shards.convert.splits import is_isolated_atom, unwanted_values
from hydrazero.shards.readers.frames import Frame

UNLABELLED = "labels that [labels] require names"
"""What atoms lack that are left out because of a missing label."""
LACKS = "has no field "
"""Start of what is said of atoms that are left out because they lack a key of [select], which follows."""


class LeftOutAtoms:
    """Elements of isolated atoms that are left out, and why."""

    def __init__(self, reasons: Mapping[str, Sequence[str]] | None = None) -> None:
        """Start with the given reasons of each element."""
        self.reasons = {symbol: set(why) for symbol, why in (reasons or {}).items()}

    def add(self, frame: Frame, select: Mapping[str, Sequence[Any]], cutoffs: Sequence[float]) -> None:
        """Take a frame that is left out, if it is an isolated atom with an energy."""
        structure = frame.unlabelled if frame.structure is None else frame.structure
        if structure is None or structure.energy is None or not is_isolated_atom(structure, cutoffs):
            return
        why = [f"{key} = {value!r}" for key, value in unwanted_values(frame.info, select).items()]
        why += [f"{LACKS}'{key}'" for key in select if key not in frame.info]
        why += [UNLABELLED] * (frame.structure is None)
        self.reasons.setdefault(chemical_symbols[int(structure.numbers[0])], set()).update(why)

    def merge(self, other: LeftOutAtoms) -> None:
        """Add the atoms of other frames."""
        for symbol, why in other.reasons.items():
            self.reasons.setdefault(symbol, set()).update(why)

    def listed(self) -> dict[str, list[str]]:
        """Return the reasons of each element in a form that JSON can hold."""
        return {symbol: sorted(why) for symbol, why in sorted(self.reasons.items())}

    def warnings(self, undetermined: Sequence[Mapping[str, float]], elements: Collection[str]) -> list[str]:
        """Return a sentence if these atoms would determine sums of reference energies that the data leave open.

        `elements` are those of the task.
        """
        missing = {symbol for combination in undetermined for symbol in combination}
        helpful = [symbol for symbol in self.reasons if symbol in missing]
        if not helpful:
            return []
        why = {reason for symbol in helpful for reason in self.reasons[symbol]}
        keys = sorted(reason.removeprefix(LACKS) for reason in why if reason.startswith(LACKS))
        values = sorted(reason for reason in why if reason != UNLABELLED and not reason.startswith(LACKS))
        steps = [f"give them the field {' and '.join(keys)}, which [select] names and they lack"] * bool(keys)
        steps += [f"add {' and '.join(values)} to [select]"] * bool(values)
        steps += ["set require = ['energy'] under [labels], since they have no other labels"] * (UNLABELLED in why)
        atoms = f"isolated atoms of {', '.join(helpful)}"
        text = f"{atoms} are left out, which would help to determine the reference energies;"
        foreign = [symbol for symbol in self.reasons if symbol not in elements]
        foreign_text = f"; leave out those of {', '.join(foreign)}, which no other structure holds" if foreign else ""
        steps = steps or ["correct their frames, which are skipped as bad"]
        return [f"{text} {' and '.join(steps)}{foreign_text}."]
