"""Exported models: one safetensors file with a description in its header, which cannot contain code."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from ase.data import atomic_numbers
from pydantic_core import from_json

from hydrazero.models.atomistic import AtomisticModel, model_from_facts
from hydrazero.models.encoders import ENCODERS
from hydrazero.models.inference.file_checks import check_card, check_shapes, check_weights, unpacked_text
from hydrazero.models.inference.model_card import Origin, digest_of, model_card, sha256_of
from hydrazero.shards.convert.element_pairs import listed_pairs, named_pairs
from hydrazero.shards.errors import ConfigError, ModelFileError, did_you_mean
from hydrazero.shards.files import replacing
from hydrazero.shards.graphs.graph import collate, graph_sample, shape_holding
from hydrazero.shards.structure import Structure
from hydrazero.shards.text.foreign_text import escaped

FORMAT = "hydrazero-model"
FORMAT_VERSION = 4
READABLE = ("2", "3", "4")
"""Versions that can be read; 2 has no card and the facts as plain JSON, 3 names each pair of elements."""
STACKED = ("energy_head.", "forces_head.", "stress_head.", "targets.", "embedding.tasks")
"""Beginnings of the names of parameters with a leading task dimension."""
MODEL_DIGEST = "model_sha256"
"""Key of the SHA-256 over facts and weights, in the header and in the card."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def with_tasks(model: AtomisticModel, names: Sequence[str]) -> AtomisticModel:
    """Return a copy with the heads of the named tasks in that order; raise ModelFileError for an unknown task."""
    known = [task.name for task in model.tasks]
    for name in names:
        if name not in known:
            raise ModelFileError(f"the model has no task '{name}'{did_you_mean(name, known)}.")
        if list(names).count(name) > 1:
            raise ModelFileError(f"task '{name}' is named twice.")
    rows = [known.index(name) for name in names]
    tasks = [model.tasks[row] for row in rows]
    attention = tuple(name for name in model.settings.attention_targets if any(name in t.targets for t in tasks))
    smaller = AtomisticModel(model.settings.model_copy(update={"attention_targets": attention}), tasks).to(model.dtype)
    wanted = smaller.state_dict().keys()
    weights = {
        key: value[rows] if key.startswith(STACKED) else value
        for key, value in model.state_dict().items()
        if key in wanted  # heads that none of these tasks uses are left out
    }
    smaller.load_state_dict(weights, strict=True)
    return smaller.eval()


def with_heads_of(model: AtomisticModel, other: AtomisticModel) -> AtomisticModel:
    """Return a copy with additional heads: those of tasks that only the `other` model has.

    Raises ModelFileError if the settings of the two models differ, so that the heads would not fit.
    """
    ours, theirs = (each.settings.model_copy(update={"attention_targets": ()}) for each in (model, other))
    if ours != theirs:
        raise ModelFileError("the heads of a model with other settings do not fit; use a run that started from it.")
    known = {task.name for task in model.tasks}
    rows = [row for row, task in enumerate(other.tasks) if task.name not in known]
    attention = tuple(dict.fromkeys([*model.settings.attention_targets, *other.settings.attention_targets]))
    tasks = [*model.tasks, *(other.tasks[row] for row in rows)]
    joined = AtomisticModel(model.settings.model_copy(update={"attention_targets": attention}), tasks).to(model.dtype)
    first, second = model.state_dict(), other.state_dict()
    with torch.no_grad():
        for key, value in joined.state_dict().items():
            if key.startswith(STACKED):
                if key in first:
                    value[: len(model.tasks)] = first[key]
                if key in second:
                    value[len(model.tasks) :] = second[key][rows]
            else:
                value.copy_(first[key] if key in first else second[key])
    return joined.eval()


def save_model(model: AtomisticModel, path: Path, *, dtype: str = "float32", origin: Origin | None = None) -> None:
    """Write a model to one file, read it back and compare its predictions; nothing is left behind on failure.

    The card in the header describes the model and its origin.

    Raises ModelFileError if the dtype is unknown or the file gives other predictions than the model.
    """
    if dtype not in DTYPES:
        raise ModelFileError(f"dtype '{dtype}' is not known{did_you_mean(dtype, list(DTYPES))}.")
    weights = {key: value.detach().cpu().to(DTYPES[dtype]).contiguous() for key, value in model.state_dict().items()}
    facts, weights_sha256 = _packed(model.facts()), sha256_of(weights)
    digest = digest_of(facts, weights_sha256)
    card = {**model_card(model, dtype, origin or Origin()), MODEL_DIGEST: digest}
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "dtype": dtype,
        "card": json.dumps(card, ensure_ascii=False),
        "facts": facts,
        "weights_sha256": weights_sha256,
        MODEL_DIGEST: digest,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as part:
            safetensors.torch.save_file(weights, str(part), metadata=header)
            _compare(model, weights, part)
            os.umask(mask := os.umask(0))  # the mask can only be read by setting it
            part.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
    except OSError as error:
        raise ModelFileError(f"{path} cannot be written ({error.strerror or error}).") from error


def _packed(facts: dict[str, Any]) -> str:
    """Return plain types as compressed text, since facts of many tasks and elements can exceed a small model."""
    tasks = [{**task, "closest": listed_pairs(task["closest"])} for task in facts["tasks"]]
    text = json.dumps({**facts, "tasks": tasks}, separators=(",", ":"))
    return base64.b85encode(zlib.compress(text.encode(), level=9)).decode()


def _unpacked(packed: str, version: str) -> dict[str, Any]:
    text = packed.encode() if version == "2" else unpacked_text(packed)
    facts: dict[str, Any] = from_json(text, allow_inf_nan=False)
    if version == "4":
        for task in facts["tasks"]:
            task["closest"] = named_pairs(task["closest"])
    return facts


def _compare(model: AtomisticModel, weights: dict[str, torch.Tensor], part: Path) -> None:
    """Raise ModelFileError unless the file predicts exactly what a model with these weights does, for every task."""
    expected = model_from_facts(model.facts()).to(_compute_dtype(weights)).eval()
    expected.load_state_dict(weights, strict=True)
    try:
        loaded = read_model(part)
    except ModelFileError as error:
        raise ModelFileError("the exported file does not reproduce the model; nothing was written.") from error
    for task, facts in enumerate(model.tasks):
        probe = probe_structure(facts.elements)
        sample = graph_sample(probe, task, model.settings.encoder.cutoff)
        batch = collate([sample], shape_holding([sample]), expected.dtype)
        ours, theirs = expected(batch), loaded(batch)
        pairs = [(ours.energy, theirs.energy), (ours.forces, theirs.forces), (ours.stress, theirs.stress)]
        pairs += [(value, theirs.targets[name]) for name, value in ours.targets.items()]
        if not all(torch.equal(a, b) for a, b in pairs):
            raise ModelFileError(
                f"the exported file does not reproduce the model for task '{facts.name}'; nothing was written."
            )


def probe_structure(elements: Sequence[str]) -> Structure:
    """Return a cluster of two atoms of each of the elements, 1.5 Å apart on a helix."""
    numbers = np.array([atomic_numbers[symbol] for symbol in elements] * 2, dtype=np.uint8)
    turn = np.arange(len(numbers))
    positions = np.stack([2.0 * np.cos(turn), 2.0 * np.sin(turn), 0.9 * turn], axis=1)
    return Structure(numbers=numbers, positions=positions, cell=np.zeros((3, 3)), pbc=np.zeros(3, dtype=bool))


def _compute_dtype(weights: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the precision of computations: float64 for float64 weights, else float32."""
    return torch.float64 if any(value.dtype == torch.float64 for value in weights.values()) else torch.float32


def read_header(path: Path) -> dict[str, Any]:
    """Return settings, tasks and dtype in the header of a model file; raise ModelFileError like `read_card`."""
    metadata = _metadata(path)
    try:
        facts = {**_unpacked(metadata["facts"], metadata["format_version"]), "dtype": metadata["dtype"]}
        if facts["dtype"] not in DTYPES:
            raise ValueError(f"its dtype is '{facts['dtype']}'")
        return facts
    except (KeyError, ValueError, TypeError, AttributeError, zlib.error) as error:
        raise ModelFileError(f"{path} has a damaged header ({_brief(error)}); export the model again.") from error


def _brief(error: Exception) -> str:
    """Return the message of an error in one line of limited length."""
    text = escaped(" ".join(str(error).split())).rstrip(".") or type(error).__name__
    return f"it lacks {text}" if isinstance(error, KeyError) else text[:200]


def read_card(path: Path | str) -> dict[str, Any] | None:
    """Return the card of a model file as plain types, without reading its weights; None if it is of version 2.

    Raises ModelFileError if the file is missing, truncated, damaged, of a newer version, or not exported by hydrazero.
    """
    metadata = _metadata(Path(path))
    if metadata["format_version"] == "2":
        return None
    text = metadata.get("card", "")
    check_card(Path(path), text)
    card: dict[str, Any] = json.loads(text)
    _check_digest(Path(path), metadata, card)
    return card


def _check_digest(path: Path, metadata: dict[str, str], card: dict[str, Any]) -> None:
    """Raise ModelFileError unless card, facts and weights were written together; earlier files do not say it."""
    digest = digest_of(metadata.get("facts", ""), metadata.get("weights_sha256", ""))
    if {metadata.get(MODEL_DIGEST), card.get(MODEL_DIGEST)} not in ({None}, {digest}):
        raise ModelFileError(
            f"{path} is damaged: its card, its facts and its weights do not belong together; copy it again, or export "
            "the model again."
        )


def check_weights_sum(path: Path) -> None:
    """Raise ModelFileError unless the weights of a file are those that were written, which earlier files do not say."""
    digest = _metadata(path).get("weights_sha256")
    if digest is None:
        return
    try:
        weights = safetensors.torch.load_file(str(path))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ModelFileError(f"{path} cannot be read ({_brief(error)}); copy it again.") from error
    _compare_sum(path, digest, weights)


def _compare_sum(path: Path, digest: str | None, weights: dict[str, torch.Tensor]) -> None:
    if digest not in (None, sha256_of(weights)):  # files of earlier versions do not contain it
        raise ModelFileError(f"{path} is damaged: its weights are not those that were written; copy it again.")


def _metadata(path: Path) -> dict[str, str]:
    if path.is_dir():
        raise ModelFileError(
            f"{path} is a folder; if it is a run's, export its model first: hydrazero export {path} --out FILE."
        )
    if not path.is_file():
        raise ModelFileError(f"model file {path} does not exist.")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path} is not a readable model file, or is truncated; name a file that 'hydrazero export' has written "
            "(data files are converted first, by 'hydrazero convert')."
        ) from error
    if metadata.get("format") != FORMAT:
        raise ModelFileError(f"{path} is a safetensors file, but not a model exported by hydrazero.")
    version = metadata.get("format_version", "")
    if version not in READABLE:
        raise ModelFileError(
            f"{path} has model format version {escaped(version[:20])}, this hydrazero reads versions "
            f"{', '.join(READABLE)}; use a matching hydrazero or export the model again."
        )
    return metadata


def _check_encoder(path: Path, facts: dict[str, Any]) -> None:
    """Raise ModelFileError if the model's encoder is unknown here, naming the package that it came from."""
    try:
        ENCODERS.check(str(facts["settings"]["encoder"]["encoder"]), facts.get("encoder_package"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{path} has a damaged header ({_brief(error)}); export the model again.") from error
    except ConfigError as error:
        raise ModelFileError(f"{path}: {escaped(error)}") from error


def read_model(path: Path) -> AtomisticModel:
    """Return an exported model on the CPU, ready to predict; raise ModelFileError like `read_header`.

    The file may be of any origin: what it says is checked before memory is taken for it.
    """
    metadata, facts = _metadata(path), read_header(path)
    _check_encoder(path, facts)
    if metadata["format_version"] != "2":
        check_card(path, metadata.get("card", ""))
    digest = metadata.get("weights_sha256")
    try:
        with torch.device("meta"):
            expected = model_from_facts(facts)
        check_shapes(path, expected)
        weights = safetensors.torch.load_file(str(path))
        _compare_sum(path, digest, weights)
        check_weights(path, weights, DTYPES[facts["dtype"]])
        read_card(path)
        model = model_from_facts(facts).to(_compute_dtype(weights))
        model.load_state_dict(weights, strict=True)
    except ModelFileError:
        raise
    except ConfigError as error:
        raise ModelFileError(f"{path} has a damaged header: {escaped(error)}") from error
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ModelFileError(
            f"{path} contains other weights than its header describes ({_brief(error)}); export the model again."
        ) from error
    return model.eval()
