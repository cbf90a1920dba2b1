"""Model files that lie, with right checksums, are refused in one sentence before memory or time is spent."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from structures import small_model

from hydrazero.models import load_model, read_card, save_model
from hydrazero.models.inference.file_checks import MOST_FACTS
from hydrazero.models.inference.model_card import sha256_of
from hydrazero.shards.errors import ModelFileError


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "good.safetensors"
    save_model(small_model(dtype=torch.float32), path)
    return path


def header_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


def packed(text: bytes) -> str:
    return base64.b85encode(zlib.compress(text)).decode()


def with_facts(good: Path, out: Path, way: tuple[Any, ...], value: Any) -> Path:
    header = header_of(good)
    facts = json.loads(zlib.decompress(base64.b85decode(header["facts"])))
    place = facts
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    changed = {**header, "facts": packed(json.dumps(facts).encode())}
    safetensors.torch.save_file(safetensors.torch.load_file(str(good)), str(out), metadata=changed)
    return out


TASK = ("tasks", 0)
ENCODER = ("settings", "encoder")
FACTS: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "scale 0": ((*TASK, "scale"), 0.0, "scale is 0.0; it must be at least"),
    "scale -1": ((*TASK, "scale"), -1.0, "scale is -1.0"),
    "scale NaN": ((*TASK, "scale"), float("nan"), "damaged header"),
    "scale a text": ((*TASK, "scale"), "1.3", "scale must be a number, not '1.3'"),
    "cutoff 1e-9": ((*ENCODER, "cutoff"), 1e-9, "cutoff is 1e-09; it must be at least 0.5"),
    "cutoff 1e9": ((*ENCODER, "cutoff"), 1e9, "cutoff is 1000000000.0; it must be at most 50"),
    "layers": ((*ENCODER, "layers"), 10**9, "layers is 1000000000; it must be at most 256"),
    "layers 2.5": ((*ENCODER, "layers"), 2.5, "layers must be a whole number, not 2.5"),
    "other features": ((*ENCODER, "features"), 60_000, "contains other weights than its header describes"),
    "no reference": ((*TASK, "reference_energies"), {"H": -13.5}, "lacks the reference energy of C, Cl, Na, O"),
    "element": ((*TASK, "elements"), ["Xx"], "'Xx' is not the symbol of an element"),
    "no elements": ((*TASK, "elements"), [], "elements has 0 entries"),
    "way": ((*TASK, "forces"), "both", "forces"),
    "flag": ((*TASK, "has_energy"), 1, "has_energy must be true or false, not 1"),
    "unknown": ((*TASK, "further"), 1, "further is not known"),
    "distance": ((*TASK, "closest"), {"elements": ["H"], "hundredths": [14.5]}, "whole hundredths"),
    "two of a name": ((*TASK, "name"), "task1", "each once"),
    "an empty sum": ((*TASK, "undetermined_sums"), [{}], "undetermined_sums"),
    "no tasks": (("tasks",), [], "must name its tasks"),
    "unit": ((*TASK, "targets"), {"gap": {"of": "structure", "kind": "scalar", "unit": "Hartree"}}, "'Hartree' is not"),
}


@pytest.mark.parametrize("case", FACTS)
def test_facts_that_lie_are_refused(good, tmp_path, case):
    way, value, words = FACTS[case]
    with pytest.raises(ModelFileError, match=words):
        load_model(with_facts(good, tmp_path / "m.safetensors", way, value))


def nan(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[0] = torch.nan
    return value


WEIGHTS = {
    "NaN": (nan, "is NaN, infinite or above 1e\\+10"),
    "type": (lambda value: value.double(), "is of type torch.float64, and should be torch.float32"),
    "shape": (lambda value: value[..., :-1].contiguous(), "of shape .*, and should be of shape"),
    "missing": (None, "is missing, and should be of shape"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(good, tmp_path, case):
    change, words = WEIGHTS[case]
    weights = safetensors.torch.load_file(str(good))
    name = sorted(weights)[0]
    value = weights.pop(name)
    if change is not None:
        weights[name] = change(value)
    out = tmp_path / "m.safetensors"
    safetensors.torch.save_file(weights, str(out), metadata={**header_of(good), "weights_sha256": sha256_of(weights)})
    with pytest.raises(ModelFileError, match=words):
        load_model(out)


def test_other_units_are_refused(good, tmp_path):
    header = header_of(good)
    card = json.loads(header["card"])
    card["units"]["energy"] = "kcal/mol"
    out = tmp_path / "m.safetensors"
    weights = safetensors.torch.load_file(str(good))
    safetensors.torch.save_file(weights, str(out), metadata={**header, "card": json.dumps(card)})
    for read in (load_model, read_card):
        with pytest.raises(ModelFileError, match=r"its units are .*kcal/mol"):
            read(out)


def test_a_card_without_facts_is_refused(good, tmp_path):
    header = header_of(good)
    del header["facts"]
    safetensors.torch.save_file(safetensors.torch.load_file(str(good)), str(tmp_path / "m.st"), metadata=header)
    for read in (read_card, load_model):
        with pytest.raises(ModelFileError):
            read(tmp_path / "m.st")


def test_a_text_is_no_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("This is a text, not a model.\n" * 20)
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    assert str(caught.value) == (
        f"{path} is not a readable model file, or is truncated; name a file that 'hydrazero export' has written (data "
        "files are converted first, by 'hydrazero convert')."
    )


@pytest.mark.parametrize(("letter", "count"), [(" ", 8 * MOST_FACTS), ("[", 1_000_000)])
def test_facts_that_unpack_to_gigabytes_take_no_memory(good, tmp_path, letter, count):
    """A few hundred kilobytes of facts that unpack to half a gigabyte, and a list that is nested without end."""
    packer = zlib.compressobj(9)
    piece = letter.encode() * (count // 8)
    facts = b"".join(packer.compress(piece) for _ in range(8)) + packer.flush()
    header = {**header_of(good), "facts": base64.b85encode(facts).decode()}
    out = tmp_path / "m.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(str(good)), str(out), metadata=header)
    code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from hydrazero.models import load_model
from hydrazero.shards.errors import ModelFileError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_model({str(out)!r})
except ModelFileError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    sentence, megabytes = done.stdout.strip().splitlines()
    assert "has a damaged header" in sentence and int(megabytes) < 3 * MOST_FACTS >> 20
