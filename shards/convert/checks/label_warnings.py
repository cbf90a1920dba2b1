"""All sentences about doubtful labels of a task, for its manifest."""

from __future__ import annotations

from hydrazero.shards.convert.checks.evidence import Evidence
from hydrazero.shards.convert.checks.lengths import length_warning
from hydrazero.shards.convert.checks.magnitudes import energy_warnings, force_warning, median_of, stress_warning
from hydrazero.shards.convert.checks.same_atoms import same_atoms_warning
from hydrazero.shards.convert.checks.work_warnings import work_warnings
from hydrazero.shards.convert.folder import Conversion
from hydrazero.shards.convert.task_statistics import FORCE_EDGES, STRESS_EDGES, Statistics


def label_warnings(job: Conversion, evidence: Evidence, equal_geometries: str | None, total: Statistics) -> list[str]:
    """Return what is doubtful in the labels of a task; it depends on the sources and the settings alone."""
    units = evidence.units or job.settings.units
    found = [equal_geometries, *evidence.methods.warnings(), *evidence.unread_conditions.warnings()]
    found += evidence.unread_stress.warnings()
    found.append(length_warning(total.length_ratios, units))
    sample = evidence.sample()
    found += energy_warnings(sample, units) or [same_atoms_warning(sample)]
    found.append(force_warning(median_of(total.forces, FORCE_EDGES), units))
    if total.most_stressed:
        worst = total.most_stressed[0]
        median = median_of(total.stresses, STRESS_EDGES)
        found.append(stress_warning(median, worst.value, worst.source_id, units))
    found += work_warnings(evidence.pairs(), job.names, units)
    if total.unused_stresses:
        found.append(
            f"the stress of {total.unused_stresses:,} structures is not used, since they are not periodic or their "
            "cells lack a vector, so that there is no volume to which it refers."
        )
    return [text for text in found if text is not None]
