"""The card of an exported model, in the header of its file: contents, training data and errors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders import ENCODERS
from hydrazero.models.task_facts import NONE, UNTRAINED, TargetFacts, TaskFacts
from hydrazero.shards.convert.references import undetermined_text
from hydrazero.shards.units import INTERNAL_UNITS


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of the weights of a model."""

    run: str = ""
    """Name of the run folder, and the step."""
    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the manifest of each task's shards, which contains the checksums of the shards."""
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Mean absolute errors of these weights on the test split of each task, and its number of 'structures'."""
    no_errors: str = "it was not exported from a run"
    """Reason why there are no errors, if there are none."""


ERROR_UNITS = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}
"""Units of errors; errors of targets are in the units of the targets."""


def weights_fingerprint(model: AtomisticModel) -> str:
    """Return the SHA-256 of a model's weights and their names."""
    return sha256_of(model.state_dict())


def model_digest(model: AtomisticModel) -> str:
    """Return the SHA-256 over a model's facts and weights, which an evaluation and an export compare.

    Facts that have the values of before they were introduced do not count, so that digests of earlier versions hold.
    """
    settings = model.settings.model_dump(exclude_defaults=True)
    text = json.dumps([settings, [_set_facts(task) for task in model.tasks]], sort_keys=True)
    return digest_of(text, weights_fingerprint(model))


def digest_of(facts: str, weights_sha256: str) -> str:
    """Return the SHA-256 over a text of facts and the SHA-256 of weights."""
    return hashlib.sha256(f"{hashlib.sha256(facts.encode()).hexdigest()} {weights_sha256}".encode()).hexdigest()


def _set_facts(facts: TaskFacts | TargetFacts) -> dict[str, Any]:
    """Return the facts of a task or a target that do not have their default values, as plain types."""
    found = {}
    for each in fields(facts):
        value = getattr(facts, each.name)
        default = each.default_factory() if callable(each.default_factory) else each.default
        if each.name == "targets":
            value = {name: _set_facts(target) for name, target in value.items()}
        if value != default:
            found[each.name] = value
    return found


def sha256_of(weights: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of weights and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_card(model: AtomisticModel, dtype: str, origin: Origin) -> dict[str, Any]:
    """Return the card of a model that is exported now, as plain types."""
    written = {"hydrazero": hydrazero_version(), "created": datetime.now(UTC).isoformat(timespec="seconds")}
    return {**written, **model_facts(model, dtype, origin)}


def model_facts(model: AtomisticModel, dtype: str, origin: Origin) -> dict[str, Any]:
    """Return the contents of a card except for the time and the version of hydrazero."""
    settings = model.settings
    package = ENCODERS.package_of(settings.encoder.encoder)
    card: dict[str, Any] = {
        "run": origin.run,
        "encoder": settings.encoder.encoder,
        **({} if package is None else {"encoder_package": f"{package.name} {package.version}"}),
        "cutoff": settings.encoder.cutoff,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": dtype,
        "units": INTERNAL_UNITS,
        "error_units": ERROR_UNITS,
        "tasks": {task.name: _task_card(task, origin) for task in model.tasks},
    }
    return card if origin.errors else {**card, "no_errors": origin.no_errors}


def _task_card(task: TaskFacts, origin: Origin) -> dict[str, Any]:
    return {
        "method": task.fidelity,
        "elements": " ".join(task.elements),
        "predicts": predicted(task),
        **({"untrained": untrained} if (untrained := _untrained(task)) else {}),
        **({"undetermined": undetermined_text(task.undetermined_sums)} if task.undetermined_sums else {}),
        "data": origin.data.get(task.name, ""),
        "errors": origin.errors.get(task.name),
    }


def predicted(task: TaskFacts) -> dict[str, str]:
    """Return the units of the quantities that a task predicts, by name."""
    found = {"energy": task.has_energy, "forces": task.forces != NONE, "stress": task.stress != NONE}
    units = {name: INTERNAL_UNITS[name] for name, there in found.items() if there}
    return units | {name: target.unit for name, target in task.targets.items()}


def _untrained(task: TaskFacts) -> dict[str, str]:
    """Return what is to be said of predicted quantities that were never trained, by name."""
    return {name: UNTRAINED[getattr(task, name)] for name in task.untrained}


def hydrazero_version() -> str:
    """Return the version of this hydrazero, 'unknown' where it is not installed as a package."""
    try:
        return metadata.version("hydrazero")
    except metadata.PackageNotFoundError:
        return "unknown"
