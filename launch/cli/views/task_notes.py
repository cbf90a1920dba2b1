"""What a user should know of a converted task, in sentences: doubtful labels and the origin of reference energies."""

from __future__ import annotations

from hydrazero.shards.convert.references import undetermined_text
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.text.foreign_text import escaped

SHOWN_DIFFERENCE = 1.0
"""Difference in eV between two reference energies of an element from which on both are shown."""


def task_notes(manifest: Manifest) -> list[str]:
    """Return sentences about a task's reference energies and labels."""
    notes = references_note(manifest)
    untrained = sorted(set(manifest.elements) - set(manifest.trained_elements))
    if untrained:
        notes.append(
            f"warning: no training structure contains {', '.join(untrained)}, so there is no reference energy for it"
        )
    notes += [f"warning: {escaped(text).removesuffix('.')}" for text in manifest.warnings]
    if manifest.undetermined_sums:  # last, since it is true of many tasks that are right
        notes.append(
            f"warning: {undetermined_text(manifest.undetermined_sums)}; add structures of other compositions, or "
            "isolated atoms"
        )
    return notes


def references_note(manifest: Manifest) -> list[str]:
    """Return where the reference energies come from, if there were isolated atoms to choose from."""
    references, isolated = manifest.reference_energies, manifest.isolated_atoms
    if manifest.references == "isolated":
        return ["reference energies: those of the isolated atoms"]
    both = [symbol for symbol in references if symbol in isolated]
    if not both:
        return []
    far = [symbol for symbol in both if abs(references[symbol] - isolated[symbol]) > SHOWN_DIFFERENCE]
    words = [f"{symbol} {references[symbol]:.3f} fitted, {isolated[symbol]:.3f} isolated" for symbol in far]
    text = "reference energies were fitted"
    if words:
        text += f"; those of isolated atoms differ by more than {SHOWN_DIFFERENCE:g} eV ({'; '.join(words)})"
    if len(both) == len(references):
        text += (
            '. If you need atomisation energies or free atoms, set references = "isolated" in the conversion file; '
            "otherwise the fit leaves less to learn"
        )
    return [text]
