"""Targets from source to batch, and runs that train on them: shapes, units, what is missing, what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
import torch
from ase import Atoms, units
from click.testing import CliRunner
from sources import make_shards, metals, molecules, write_extxyz

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.convert.workers import worker_processes
from hydrazero.shards.errors import ConfigError, HydrazeroError, SourceError
from hydrazero.shards.files import read_json
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, TrainStream, evaluation_batches
from hydrazero.shards.targets import TargetColumn
from hydrazero.trainer.records.run_files import read_metrics

TARGETS = """
[targets.gap]
field = "homo_lumo"
unit = "Hartree"
[targets.polarizability]
field = "alpha"
unit = "Bohr^3"
extensive = true
[targets.charges]
field = "q"
of = "atom"
unit = "e"
[targets.atom_dipoles]
field = "mu_i"
of = "atom"
kind = "vector"
unit = "e*Angstrom"
[targets.dipole]
field = "mu"
kind = "vector"
unit = "Debye"
"""
COLUMNS = (
    TargetColumn(name="gap", of="structure", kind="scalar"),
    TargetColumn(name="charges", of="atom", kind="scalar"),
    TargetColumn(name="atom_dipoles", of="atom", kind="vector"),
    TargetColumn(name="dipole", of="structure", kind="vector"),
)


def frames_with_targets(count: int = 60) -> list[Atoms]:
    """Every third has no gap, every fifth no charges, one atom of each seventh no charge of its own."""
    generator = np.random.default_rng(0)
    frames = molecules(count)
    for number, atoms in enumerate(frames):
        atoms.info["alpha"] = 5.0 * len(atoms) + generator.normal()
        atoms.info["mu"] = generator.normal(size=3)
        atoms.arrays["mu_i"] = generator.normal(size=(len(atoms), 3))
        if number % 3:
            atoms.info["homo_lumo"] = 0.3 + 0.01 * generator.normal()
        if number % 5:
            atoms.arrays["q"] = generator.normal(size=len(atoms))
            if number % 7 == 1:
                atoms.arrays["q"][0] = np.nan
    return frames


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("targets")
    source = write_extxyz(root / "qm.extxyz", frames_with_targets())
    (root / "settings.toml").write_text(TARGETS)
    convert([source], "qm", root / "qm", load_convert_settings(root / "settings.toml"))
    make_shards(root, "metals", metals(60))
    return root


def by_name(folder: Path) -> dict[str, object]:
    found = {}
    for split in ("train", "val", "test"):
        reader = BlockReader(folder, split)
        for number in range(len(reader)):
            block = reader.read(number)
            found |= {block.names[row]: block.structure(row) for row in range(len(block))}
    return found


def test_every_value_arrives_in_our_units_and_what_is_missing_stays_missing(shards):
    held = by_name(shards / "qm")
    for number, atoms in enumerate(ase.io.read(shards / "qm.extxyz", index=":")):
        structure = held[f"qm.extxyz#{number}"]
        np.testing.assert_allclose(structure.targets["polarizability"], atoms.info["alpha"] * units.Bohr**3, rtol=1e-12)
        np.testing.assert_allclose(structure.targets["dipole"], np.array(atoms.info["mu"]) * units.Debye, rtol=1e-12)
        np.testing.assert_allclose(structure.atom_targets["atom_dipoles"], atoms.arrays["mu_i"], rtol=1e-12)
        assert ("gap" in structure.targets) == bool(number % 3)
        assert ("charges" in structure.atom_targets) == bool(number % 5)
        if number % 3:
            np.testing.assert_allclose(structure.targets["gap"], atoms.info["homo_lumo"] * units.Hartree, rtol=1e-12)
        if number % 5:
            np.testing.assert_array_equal(structure.atom_targets["charges"], atoms.arrays["q"])


def test_the_manifest_tells_count_range_and_unit_of_each(shards):
    facts = read_manifest(shards / "qm").targets
    reader = BlockReader(shards / "qm", "train")
    structures = [b.structure(row) for b in map(reader.read, range(len(reader))) for row in range(len(b))]
    gaps = [float(s.targets["gap"]) for s in structures if "gap" in s.targets]
    assert (facts["gap"].count, facts["gap"].unit) == (len(gaps), "eV")
    assert facts["gap"].mean == pytest.approx(np.mean(gaps)) and facts["gap"].deviation == pytest.approx(np.std(gaps))
    per_atom = [float(s.targets["polarizability"]) / len(s) for s in structures]
    assert facts["polarizability"].mean == pytest.approx(np.mean(per_atom))
    assert facts["dipole"].mean == 0 and facts["dipole"].count == 3 * len(structures)
    assert read_manifest(shards / "metals").targets == {}
    shown = CliRunner().invoke(main, ["inspect", str(shards / "qm")]).output
    assert "polarizability" in shown and "Å³" in shown and "atom_dipoles" in shown


def settings_of(shards: Path, **values: object) -> StreamSettings:
    return StreamSettings(
        folders=(str(shards / "qm"), str(shards / "metals")),
        cutoff=4.0,
        shape=BatchShape(structures=8, atoms=60, slots=2048),
        targets=COLUMNS,
        **values,  # type: ignore[arg-type]
    )


def test_batches_hold_them_with_masks_the_same_from_workers(shards):
    held = by_name(shards / "qm") | by_name(shards / "metals")
    seen = 0
    for batch in evaluation_batches(SplitReader(settings_of(shards), "train"), 0, 1):
        first = 0
        for number, name in enumerate(batch.source_ids()):
            structure = held[name]
            atoms = slice(first, first + len(structure))
            first = atoms.stop
            gap = structure.targets.get("gap")
            assert bool(batch.target_gap_mask[number]) == (gap is not None)
            assert float(batch.target_gap[number]) == pytest.approx(0.0 if gap is None else float(gap), rel=1e-6)
            charges = structure.atom_targets.get("charges", np.full(len(structure), np.nan))
            np.testing.assert_array_equal(batch.target_charges_mask[atoms], ~np.isnan(charges))
            np.testing.assert_allclose(batch.target_charges[atoms], np.nan_to_num(charges), rtol=1e-6)
            expected = structure.atom_targets.get("atom_dipoles", np.zeros((len(structure), 3)))
            np.testing.assert_allclose(batch.target_atom_dipoles[atoms], expected, rtol=1e-5, atol=1e-7)
            seen += 1
        assert not batch.target_gap_mask[len(batch.source_ids()) :].any()
        assert not batch.target_charges_mask[first:].any()
    assert seen == sum(read_manifest(shards / task).structures("train") for task in ("qm", "metals"))
    here, there = (iter(TrainStream(settings_of(shards, workers=workers), 0, 1)) for workers in (0, 1))
    for _ in range(4):
        a, b = next(here), next(there)
        assert torch.equal(a.target_atom_dipoles, b.target_atom_dipoles)
        assert torch.equal(a.target_dipole_mask, b.target_dipole_mask)


def test_without_targets_batches_are_as_they_were(shards):
    settings = StreamSettings(
        folders=(str(shards / "metals"),), cutoff=4.0, shape=BatchShape(structures=8, atoms=60, slots=2048)
    )
    batch = next(evaluation_batches(SplitReader(settings, "train"), 0, 1))
    assert not any(name.startswith("target") for name in batch.to_dict())


def test_the_same_bytes_from_any_number_of_workers(shards, tmp_path):
    with worker_processes(2) as workers:
        settings = load_convert_settings(shards / "settings.toml")
        convert([shards / "qm.extxyz"], "qm", tmp_path / "qm", settings, workers=workers)
    for path in (shards / "qm").iterdir():
        assert path.read_bytes() == (tmp_path / "qm" / path.name).read_bytes()


def test_npz_and_hdf5(tmp_path):
    generator = np.random.default_rng(1)
    numbers, positions = np.array([8, 1, 1]), generator.normal(size=(20, 3, 3)) + np.eye(3) * 3
    charges, gaps, dipoles = generator.normal(size=(20, 3)), generator.normal(size=20), generator.normal(size=(20, 3))
    plain = {"z": numbers, "R": positions, "E": np.arange(20.0), "F": np.zeros((20, 3, 3))}
    np.savez(tmp_path / "w.npz", **plain, q=charges, gap=gaps, mu=dipoles)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for number in range(20):
            group = file.create_group(f"w{number:02d}")
            parts = {"z": numbers, "R": positions[number], "E": float(number), "F": np.zeros((3, 3))}
            for name, value in {**parts, "q": charges[number], "gap": gaps[number], "mu": dipoles[number]}.items():
                group[name] = value
    targets = """
labels = {require = ["energy"]}
[targets.charges]
field = "q"
of = "atom"
[targets.gap]
field = "gap"
[targets.dipole]
field = "mu"
kind = "vector"
"""
    columns = """
[columns]
numbers = "z"
positions = "R"
energy = "E"
forces = "F"
q = "q"
gap = "gap"
mu = "mu"
"""
    (tmp_path / "npz.toml").write_text(targets)
    (tmp_path / "h5.toml").write_text('format = "hdf5_groups"\n' + targets + columns)
    for suffix in ("npz", "h5"):
        convert([tmp_path / f"w.{suffix}"], "w", tmp_path / suffix, load_convert_settings(tmp_path / f"{suffix}.toml"))
        for structure in by_name(tmp_path / suffix).values():
            number = round(float(structure.energy))
            # Three charges of three atoms are not taken for a vector, nor a dipole for charges.
            np.testing.assert_array_equal(structure.atom_targets["charges"], charges[number])
            np.testing.assert_array_equal(structure.targets["dipole"], dipoles[number])
            assert float(structure.targets["gap"]) == gaps[number]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[targets.gap]\nfield = "homo_lumo"\nunit = "Hartee"', "did you mean 'Hartree'"),
        ('[targets.gap]\nfield = "homo_lumo"\nof = "atoms"', "did you mean 'atom'"),
        ('[targets.energy]\nfield = "homo_lumo"', "none of energy"),
        ('[targets.gap]\nfield = "homo_lumo"\nkind = "tensor"', "'tensor' is not known"),
        ('[targets.q]\nfield = "q"\nof = "atom"\nextensive = true', "scalars of structures alone"),
        ('[targets.gap]\nfeild = "homo_lumo"', "did you mean 'field'"),
        ('[targets.gap]\nfield = "homo"', "no training structure has the target 'gap' \\(field 'homo'\\)"),
        ('[targets.gap]\nfield = "mu"', "the gap has shape \\(3,\\), not \\(\\)"),
        ('[labels]\nrequire = ["energy", "gab"]\n[targets.gap]\nfield = "homo_lumo"', "did you mean 'gap'"),
        ('[labels]\nrequire = ["gap"]\n[targets.gap]\nfield = "homo_lumo"', "has no gap \\(field 'homo_lumo'"),
    ],
)
def test_targets_that_cannot_be(shards, tmp_path, text, words):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(HydrazeroError, match=words) as caught:
        settings = load_convert_settings(tmp_path / "s.toml")
        convert([shards / "qm.extxyz"], "x", tmp_path / "x", settings)
    assert isinstance(caught.value, ConfigError | SourceError) and not (tmp_path / "x").exists()


RUN = """
[run]
out = "{out}"
[[tasks]]
name = "qm"
shards = "{root}/qm"
[[tasks]]
name = "metals"
shards = "{root}/metals"
[model]
features = 16
layers = 2
radial_functions = 6
cutoff = 4.0
head_features = 8
ensemble = 3
attention_targets = ["gap"]
[batch]
structures = 8
atoms = 48
slots = 1536
[data]
workers = 0
[train]
steps = 30
evaluate_every = 15
checkpoint_every = 30
[deepspeed]
config = "zero1"
"""


def run_file(shards: Path, tmp_path: Path, text: str = RUN) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text.format(out=tmp_path / "run", root=shards))
    return path


def test_a_run_learns_targets_stress_and_spread_and_its_model_predicts_them(shards, tmp_path):
    run = run_file(shards, tmp_path)
    result = CliRunner().invoke(main, ["train", str(run)])
    assert result.exit_code == 0, result.output
    tasks = {task["name"]: task for task in read_json(tmp_path / "run" / "model.json")["tasks"]}
    assert tasks["qm"]["forces"] == "conservative" and tasks["metals"]["targets"] == {}
    evaluations = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "evaluation"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    last = evaluations[-1]["tasks"]
    assert set(last["qm"]["target_mae"]) == {"gap", "polarizability", "charges", "atom_dipoles", "dipole"}
    assert last["metals"]["target_mae"]["gap"] is None and last["metals"]["stress_mae_mev_per_angstrom3"] > 0
    assert last["qm"]["energy_spread_mev_per_atom"] > 0
    evaluated = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run")])
    assert evaluated.exit_code == 0, evaluated.output
    document = read_json(tmp_path / "run" / "evaluation.json")["tasks"]
    gap = document["qm"]["targets"]["gap"]
    assert gap["unit"] == "eV" and gap["count"] > 0 and gap["mae"] > 0 and gap["trivial_mae"] > 0
    assert document["metals"]["stress_mae_mev_per_angstrom3"] > 0
    assert document["qm"]["energy_spread"]["count"] == document["qm"]["structures"]
    reported = CliRunner().invoke(main, ["report", str(tmp_path / "run")])
    assert reported.exit_code == 0, reported.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "polarizability" in page and "calibration of the ensemble" in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('name = "qm"', 'name = "qm"\ntargets = ["gab"]'), "did you mean 'gap'"),
        (('name = "metals"', 'name = "metals"\ntargets = ["gap"]'), "no training structure in"),
        (('name = "qm"', 'name = "qm"\nforces = "direct"\nstress = "conservative"'), "mixes direct forces"),
        (('name = "qm"', 'name = "qm"\nforces = "directly"'), "did you mean 'direct'"),
        (("[model]", '[model]\nencoder = "schnett"'), "did you mean 'schnet'"),
        (("[model]", '[model]\nencoder = "schnet"'), "needs vectors for atom_dipoles, dipole"),
        (('["gap"]', '["charges"]'), "not a mean over atoms"),
        (("[train]", "[loss]\ntarget_weights = {{gab = 2.0}}\n[train]"), "did you mean 'gap'"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_the_first_step(shards, tmp_path, change, words):
    result = CliRunner().invoke(main, ["train", str(run_file(shards, tmp_path, RUN.replace(*change)))])
    assert result.exit_code == 1 and words in result.output + (result.stderr or "")
    assert not (tmp_path / "run").exists()


def test_a_task_without_energies_has_no_conservative_forces(shards, tmp_path):
    settings = tmp_path / "s.toml"
    settings.write_text('[fields]\nenergy = "none"\n[labels]\nrequire = ["gap"]\n[targets.gap]\nfield = "homo_lumo"\n')
    frames = [atoms for atoms in frames_with_targets() if "homo_lumo" in atoms.info]
    for atoms in frames:
        atoms.calc = None
    source = write_extxyz(tmp_path / "gaps.extxyz", frames)
    convert([source], "gaps", tmp_path / "gaps", load_convert_settings(settings))
    assert read_manifest(tmp_path / "gaps").reference_energies == {}
    text = RUN.replace('name = "qm"', 'name = "gaps"').replace("{root}/qm", str(tmp_path / "gaps"))
    wrong = text.replace('name = "gaps"', 'name = "gaps"\nforces = "conservative"')
    result = CliRunner().invoke(main, ["train", str(run_file(shards, tmp_path, wrong))])
    assert result.exit_code == 1 and "has no energies" in result.output + (result.stderr or "")
    result = CliRunner().invoke(main, ["train", str(run_file(shards, tmp_path, text)), "--set", "train.steps=2"])
    assert result.exit_code == 0, result.output
    described = json.loads((tmp_path / "run" / "model.json").read_text())["tasks"]
    assert [task["forces"] for task in described] == ["none", "conservative"]
