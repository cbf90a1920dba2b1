"""The whole report of `hydrazero doctor`, as text and for programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydrazero.launch.doctor.devices import device_probes
from hydrazero.launch.doctor.findings import Finding, Probe, find_all
from hydrazero.launch.doctor.machine import machine_probes
from hydrazero.launch.doctor.software import launcher_probes, optional_probes, version_probes

SECTIONS: dict[str, Callable[[], list[Probe]]] = {
    "Versions": version_probes,
    "Machine": machine_probes,
    "Devices": device_probes,
    "Launchers": launcher_probes,
    "Optional parts": optional_probes,
}


def examine() -> dict[str, list[Finding]]:
    """Return the findings of each section; nothing that is broken raises."""
    return {heading: find_all(_probes(heading, probes)) for heading, probes in SECTIONS.items()}


def _probes(heading: str, probes: Callable[[], list[Probe]]) -> list[Probe]:
    try:
        return probes()
    except Exception as error:
        reason = f"not known ({type(error).__name__}: {error})"
        return [Probe(name=heading.lower(), find=lambda: reason)]


def report_text(sections: dict[str, list[Finding]]) -> str:
    """Return the report as lines to read, and to paste into a bug report."""
    lines: list[str] = []
    for heading, findings in sections.items():
        width = max((len(one.name) for one in findings), default=0)
        lines += [heading, *(f"  {one.name:{width}}  {one.value}" for one in findings), ""]
    advice = [f"  {one.name}: {one.missing}" for findings in sections.values() for one in findings if one.missing]
    return "\n".join([*lines, *(["Missing", *advice] if advice else ["Nothing is missing."])])


def report_json(sections: dict[str, list[Finding]]) -> dict[str, Any]:
    """Return the report for programs: section -> name -> value, and under 'Missing' name -> what to do."""
    values = {heading: {one.name: one.value for one in findings} for heading, findings in sections.items()}
    missing = {one.name: one.missing for findings in sections.values() for one in findings if one.missing}
    return {**values, "Missing": missing}
