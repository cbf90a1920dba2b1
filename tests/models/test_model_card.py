"""The card of an exported model: what it tells, that it belongs to the weights, how small the file stays."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from ase.data import chemical_symbols
from click.testing import CliRunner
from placed import make_split_shards
from sources import labelled, molecules
from structures import facts, rattled_crystal, rattled_molecule, small_model

from hydrazero.launch.cli.main import main
from hydrazero.models import Potential, load_model, read_card, save_model
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders import size_settings
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.inference.model_card import Origin
from hydrazero.models.model_settings import ModelSettings
from hydrazero.shards.errors import ModelFileError
from hydrazero.shards.files import write_json
from hydrazero.shards.manifest import manifest_sha256, read_manifest
from hydrazero.trainer.config.sections import TaskSection
from hydrazero.trainer.config.tasks import cutoff_warning, task_facts
from hydrazero.trainer.evaluation import export as exporting
from hydrazero.trainer.evaluation.evaluate import evaluate, results_in


def run(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)), env={"COLUMNS": "120"})
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture
def trained(tmp_path, monkeypatch) -> tuple[Path, Path, AtomisticModel]:
    """A run folder as training leaves it, its shards, and the model that its checkpoint gives."""
    alone = small_model(dtype=torch.float32)
    model = AtomisticModel(alone.settings.model_copy(update={"ensemble": 2}), alone.tasks).eval()
    test = [labelled(rattled_molecule("H2O", seed)) for seed in range(4)]
    val = [labelled(rattled_molecule("CH4", 9))]
    shards = make_split_shards(tmp_path / "shards", "task0", train=molecules(3), val=val, test=test)
    folder = tmp_path / "a_run"
    step = folder / "checkpoints" / "step-00000020"
    step.mkdir(parents=True)
    (step / "checksums.json").write_text("{}")
    manifests = {"task0": manifest_sha256(shards)}
    settings = {"encoder": "painn", "features": 8, "layers": 2, "cutoff": 4.0}
    start = {"command": "", "started": "", "versions": {}, "model": settings, "train": {"steps": 20}, "ranks": 1}
    tasks = [{"name": "task0", "shards": str(shards)}]
    write_json(folder / "run.json", {**start, "manifests": manifests, "tasks": tasks})
    monkeypatch.setattr(exporting, "model_of_run", lambda _: deepcopy(model))
    return folder, shards, model


def test_a_card_tells_data_and_test_errors(trained, tmp_path):
    folder, shards, model = trained
    evaluation = evaluate(Potential(model), [shards], "test", results_in(folder))
    out = tmp_path / "m.safetensors"
    run("export", folder, "--out", out)
    card = read_card(out)
    assert card["tasks"]["task0"]["data"] == manifest_sha256(shards) and card["run"] == "a_run, step 20"
    task = evaluation.tasks["task0"]
    errors = card["tasks"]["task0"]["errors"]
    assert errors["structures"] == 4 and errors["energy"] == pytest.approx(task.energy_mae, rel=1e-4)
    assert card["tasks"]["task1"]["errors"] is None and "no_errors" not in card
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert (card["encoder"], card["cutoff"], card["dtype"]) == ("painn", 4.0, "float32")
    spread = load_model(out).facts("task0").largest_spread
    assert 1000 * spread == pytest.approx(task.energy_spread.quantile_99) and spread > 0
    shown = run("inspect", out)
    for word in ("a_run, step 20", "eV/Å³", "C Cl H Na O", manifest_sha256(shards)[:12], f"{errors['forces']:.2f}"):
        assert word in shown, word
    assert json.loads(run("inspect", out, "--json")) == card
    with safetensors.safe_open(str(out), framework="pt") as file:
        weights, metadata = {name: 2 * file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    safetensors.torch.save_file(weights, str(tmp_path / "other.safetensors"), metadata=metadata)
    said = run("inspect", tmp_path / "other.safetensors", exit_code=1)
    assert "other.safetensors is damaged: its weights are not those that were written" in said
    one = tmp_path / "one.safetensors"
    run("export", folder, "--out", one, "--tasks", "task0", "--dtype", "float64")
    assert list(read_card(one)["tasks"]) == ["task0"] and read_card(one)["tasks"]["task0"]["errors"] == errors


def test_errors_of_other_weights_or_splits_are_not_told(trained, tmp_path):
    folder, shards, model = trained

    def reason(name: str, *options: str) -> str:
        run("export", folder, "--out", tmp_path / name, *options)
        card = read_card(tmp_path / name)
        assert all(task["errors"] is None for task in card["tasks"].values())
        assert card["no_errors"] in " ".join(run("inspect", tmp_path / name).split())
        return card["no_errors"]

    assert "was not evaluated" in reason("a.safetensors")
    evaluate(Potential(model), [shards], "val", results_in(folder))
    assert "used the split 'val'" in reason("b.safetensors")
    evaluate(Potential(model), [shards], "test", results_in(folder))
    assert "bfloat16 rounds" in reason("c.safetensors", "--dtype", "bfloat16")
    with torch.no_grad():
        next(model.parameters()).add_(1e-4)
    assert "used other weights or facts" in reason("d.safetensors")
    assert load_model(tmp_path / "d.safetensors").facts("task0").largest_spread == 0.0


def test_files_of_version_2_load(tmp_path):
    model = small_model(dtype=torch.float32)
    known = model.facts()
    for task in known["tasks"]:  # which version 2 did not have
        for name in ("closest", "closest_within", "largest_spread"):
            del task[name]
    header = {"format": "hydrazero-model", "format_version": "2", "dtype": "float32", "facts": json.dumps(known)}
    old = tmp_path / "old.safetensors"
    safetensors.torch.save_file(model.state_dict(), str(old), metadata=header)
    atoms = [rattled_molecule(), rattled_crystal()]
    ours, theirs = Potential(model).predict(atoms), load_model(old).predict(atoms)
    assert all(a["energy"] == b["energy"] for a, b in zip(ours, theirs, strict=True))
    assert read_card(old) is None
    shown = run("inspect", old)
    assert "the file has format version 2, which contains no card" in shown and "task1" in shown


def large_facts(name: str):
    """A task of 89 elements, most of whose pairs have been neighbours."""
    rng = np.random.default_rng(list(name.encode()))
    symbols = chemical_symbols[1:90]
    pairs = {
        f"{a}-{b}": round(float(rng.uniform(0.7, 3.5)), 2)
        for n, a in enumerate(symbols)
        for b in symbols[n:]
        if rng.random() < 0.8
    }
    energies = {symbol: float(rng.normal()) for symbol in symbols}
    return facts(name, elements=sorted(symbols), reference_energies=energies, closest=pairs, closest_within=6.0)


@pytest.mark.parametrize(
    ("size", "tasks"),
    [
        ("tiny", [facts("a")]),
        ("small", [facts(f"task{n}") for n in range(5)]),
        ("base", [large_facts(f"task{n}") for n in range(16)]),
    ],
)
def test_the_file_is_hardly_larger_than_its_weights(tmp_path, size, tasks):
    settings = size_settings("painn", size)
    heads = settings.pop("head_features")
    model = AtomisticModel(ModelSettings(encoder=EncoderSettings(**settings), head_features=heads), tasks)
    data = {task.name: "f" * 64 for task in tasks}
    errors = {task.name: {"structures": 1000, "energy": 10.123, "forces": 100.12, "stress": 1.1234} for task in tasks}
    save_model(model, tmp_path / "m.safetensors", origin=Origin(run="a run, step 10000", data=data, errors=errors))
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "m.safetensors").stat().st_size <= 1.05 * weights


def test_damaged_files_are_told_in_a_sentence(tmp_path):
    good = tmp_path / "good.safetensors"
    save_model(small_model(), good)
    content = good.read_bytes()
    header = safetensors.safe_open(str(good), framework="pt").metadata()
    bad = tmp_path / "bad.safetensors"

    def refused(words: str) -> None:
        for call in (lambda: load_model(bad), lambda: run_inspect(bad)):
            with pytest.raises(ModelFileError, match=words):
                call()
        assert run("inspect", bad, exit_code=1).count("Error: ") == 1

    def run_inspect(path: Path) -> None:
        from hydrazero.launch.cli.views.model_card_view import card_of

        card_of(path)

    for cut in (0, 5, len(content) // 2):
        bad.write_bytes(content[:cut])
        refused("not a readable model file, or is truncated")
    weights = small_model().state_dict()
    safetensors.torch.save_file(weights, str(bad), metadata={**header, "facts": "!", "card": "{"})
    refused("damaged header")
    safetensors.torch.save_file(weights, str(bad), metadata={**header, "format_version": "9"})
    refused("has model format version 9, this hydrazero reads versions 2, 3, 4")
    safetensors.torch.save_file(weights, str(bad))
    refused("not a model exported by hydrazero")
    assert "does not exist" in run("inspect", tmp_path / "none.safetensors", exit_code=1)
    assert "inspect it alone" in run("inspect", good, good, exit_code=1)


def test_smallest_distances_reach_the_model(tmp_path):
    water = labelled(rattled_molecule("H2O", 1))
    near = labelled(rattled_molecule("H2O", 2, amplitude=0.3))  # of the test split, so nobody is trained on it
    folder = make_split_shards(tmp_path, "task0", train=[water, labelled(rattled_molecule("CH4", 3))], test=[near])
    manifest = read_manifest(folder)
    assert manifest.closest.keys() == {"H-H", "H-O", "H-C"} and manifest.closest_within == 6.0
    expected = min(water.get_distance(0, 1), water.get_distance(0, 2))
    assert expected - 0.01 <= manifest.closest["H-O"] <= expected
    nearest = min(manifest.closest.values())
    assert cutoff_warning("task0", manifest, nearest + 0.01) is None
    told = cutoff_warning("task0", manifest, nearest)
    assert told is not None and f"closer than {nearest:.2f} Å" in told
    known = task_facts(TaskSection(name="task0", shards=str(folder)), manifest)
    assert known.closest == manifest.closest and known.closest_within == 6.0
