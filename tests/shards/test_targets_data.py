"""Targets out of every kind of source into batches: all four shapes, what is missing, what cannot be, what is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import units
from click.testing import CliRunner
from rich.console import Console
from sources import molecules, write_extxyz
from target_files import (
    COUNT,
    FACTORS,
    NAMES,
    READING,
    TARGETS,
    aselmdb,
    database,
    extxyz,
    hdf5,
    hdf5_groups,
    lmdb,
    npz,
    parquet,
    pymatgen,
    ragged,
    samples,
    sizes_of,
)

from hydrazero.launch.cli.main import main
from hydrazero.launch.cli.views.shards_view import describe
from hydrazero.models.task_facts import targets_of
from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import ConfigError, SourceError, StructureError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.manifest import SPLITS, read_manifest
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, TrainStream, evaluation_batches
from hydrazero.shards.structure import MAX_MAGNITUDE, Structure
from hydrazero.shards.targets import TargetColumn, TargetSection, target_value
from hydrazero.trainer.config.sections import TaskSection
from hydrazero.trainer.config.tasks import task_facts

COLUMNS = tuple(
    TargetColumn(name=name, of=of, kind=kind)
    for name, of, kind in (
        ("gap", "structure", "scalar"),
        ("dipole", "structure", "vector"),
        ("charges", "atom", "scalar"),
        ("atom_dipoles", "atom", "vector"),
    )
)


def settings_file(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def structures_in(folder: Path) -> list[Structure]:
    readers = [BlockReader(folder, split) for split in SPLITS]
    blocks = [reader.read(number) for reader in readers for number in range(len(reader))]
    return [block.structure(row) for block in blocks for row in range(len(block))]


def stream_settings(*folders: Path, **values: Any) -> StreamSettings:
    shape = BatchShape(structures=6, atoms=40, slots=1600)
    names = tuple(str(folder) for folder in folders)
    return StreamSettings(folders=names, cutoff=4.0, shape=shape, targets=COLUMNS, **values)


@pytest.mark.parametrize(
    "write", [extxyz, database, aselmdb, hdf5, npz, hdf5_groups, parquet, pymatgen, lmdb], ids=lambda f: f.__name__
)
def test_all_four_shapes_from_every_kind_of_source_into_a_batch(tmp_path, write: Callable[[Path], Path]):
    text = READING.get(write, "") + TARGETS.replace("PREFIX", "computed." if write is pymatgen else "")
    settings = load_convert_settings(settings_file(tmp_path, text))
    convert([write(tmp_path)], "a", tmp_path / "out", settings, trust_pickle=True)
    found = structures_in(tmp_path / "out")
    assert len(found) == COUNT
    wanted: dict[str, dict[str, Any]] = {}
    for structure in found:
        atoms, values = samples()[round(structure.energy or 0.0)]
        held = {**structure.targets, **structure.atom_targets}
        assert set(held) == {NAMES[name] for name in values}
        wanted[structure.source_id] = held
        for name, value in values.items():
            assert held[NAMES[name]].shape == sizes_of(atoms)[name]
            np.testing.assert_allclose(held[NAMES[name]], np.multiply(value, FACTORS[name]), rtol=1e-12)
    for batch in evaluation_batches(SplitReader(stream_settings(tmp_path / "out"), "train"), 0, 1):
        for column in COLUMNS:
            atom = column.of == "atom"
            values, mask = batch[f"target_{column.name}"], batch[f"target_{column.name}_mask"]
            assert values.shape == (40 if atom else 6, *([3] if column.kind == "vector" else []))
            assert values.dtype == torch.float32 and mask.shape == values.shape[:1]
            assert not values[~mask].any()
            begin = 0
            for name, size in zip(batch.source_ids(), batch.n_atoms.tolist(), strict=False):
                part = slice(begin, begin + (size if atom else 1))
                begin = part.stop
                assert mask[part].all() == mask[part].any() == (column.name in wanted[name])
                if column.name in wanted[name]:
                    expected = wanted[name][column.name].reshape(values[part].shape)
                    np.testing.assert_allclose(values[part], expected, rtol=1e-6)
            assert not mask[begin:].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_gives_the_same_targets(tmp_path, workers):
    settings = load_convert_settings(settings_file(tmp_path, TARGETS.replace("PREFIX", "")))
    convert([extxyz(tmp_path)], "a", tmp_path / "a", settings)
    write_extxyz(tmp_path / "b.extxyz", molecules(COUNT, seed=1))
    convert([tmp_path / "b.extxyz"], "b", tmp_path / "b", load_convert_settings(None))
    options = stream_settings(tmp_path / "a", tmp_path / "b", workers=workers)
    whole = TrainStream(options, 0, 1)
    walk = iter(whole)
    for _ in range(5):
        next(walk)
    saved = whole.saved_state([whole.state()])
    seen = set()
    for batch, again in zip(walk, iter(TrainStream(options, 0, 1, saved)), strict=False):
        assert batch.source_ids() == again.source_ids()
        for name in (key for key in batch.to_dict() if key.startswith("target_")):
            assert torch.equal(batch[name], again[name])
        # The task that has no targets has every one of them masked.
        other = torch.zeros_like(batch.structure_mask)
        for row, name in enumerate(batch.source_ids()):
            other[row] = name.startswith("b.")
        assert not (batch.target_dipole_mask & other).any()
        assert not (batch.target_charges_mask & other[batch.structure]).any()
        seen.update(batch.source_ids())
        if len(seen) > COUNT:
            break
    assert any(name.startswith("a.") for name in seen) and any(name.startswith("b.") for name in seen)


SECTION = {
    "scalar": TargetSection(field="x"),
    "vector": TargetSection(field="x", kind="vector"),
    "atom": TargetSection(field="x", of="atom"),
    "atom_vector": TargetSection(field="x", of="atom", kind="vector"),
    "size": TargetSection(field="x", of="atom", unit="muB", absolute=True),
}


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("atom_vector", np.zeros((3, 4)), "x_shape"),  # as many numbers, of other atoms
        ("atom_vector", np.zeros((4, 2)), "x_shape"),
        ("atom", np.zeros((2, 2)), "x_shape"),
        ("scalar", [1.0, 2.0], "x_shape"),
        ("scalar", "low", "x_shape"),
        ("vector", [[1.0, 2.0], [3.0]], "x_shape"),
        ("scalar", -np.inf, "non_finite_x"),
        ("atom", [0, 0, 0, 10 * MAX_MAGNITUDE], "non_finite_x"),  # float32 would hold infinity for 1e40
    ],
)
def test_values_that_cannot_be(kind, value, reason):
    with pytest.raises(StructureError) as caught:
        target_value("x", SECTION[kind], value, 4)
    assert caught.value.reason == reason


def test_values_in_any_of_their_forms():
    vectors = np.arange(12.0).reshape(4, 3)
    for form in (vectors, vectors[None], vectors.ravel(), vectors.tolist()):
        np.testing.assert_array_equal(target_value("x", SECTION["atom_vector"], form, 4), vectors)
    assert target_value("x", SECTION["scalar"], [[2.0]], 4) == 2.0
    np.testing.assert_array_equal(target_value("x", SECTION["atom_vector"], [1.0, 2, 3], 1), [[1, 2, 3]])
    np.testing.assert_array_equal(target_value("x", SECTION["size"], [1.0, -2, None, 0], 4), [1, 2, np.nan, 0])
    for nothing in (None, np.nan, [None, None, None, None]):
        assert target_value("x", SECTION["atom" if isinstance(nothing, list) else "scalar"], nothing, 4) is None
    # A vector that is known in part is not known.
    assert target_value("x", SECTION["vector"], [1.0, np.nan, 2.0], 4) is None
    vectors[1, 2] = np.nan
    partly = target_value("x", SECTION["atom_vector"], vectors, 4)
    assert np.isnan(partly[1]).all() and not np.isnan(partly[[0, 2, 3]]).any()


def test_a_wrong_shape_sets_a_frame_aside_by_its_reason(tmp_path):
    frames = [atoms for atoms, _ in samples()]
    for number, atoms in enumerate(frames):
        atoms.info["gap"] = [0.1, 0.2] if number == 7 else 0.1
    source = write_extxyz(tmp_path / "a.extxyz", frames)
    settings = load_convert_settings(settings_file(tmp_path, '[targets.gap]\nfield = "gap"\n'))
    with pytest.raises(SourceError, match=r"a.extxyz, frame 7: the gap has shape \(2,\), not \(\)"):
        convert([source], "a", tmp_path / "out", settings)
    manifest = convert([source], "a", tmp_path / "out", settings, skip_bad=True)
    assert manifest.set_aside == {"gap_shape": 1} and manifest.structures() == COUNT - 1


def test_an_optional_target_may_be_in_no_source(tmp_path):
    source = extxyz(tmp_path)
    spin = '[targets.spin]\nfield = "magmom"\nof = "atom"\noptional = true\n'
    settings = load_convert_settings(settings_file(tmp_path, spin + TARGETS.replace("PREFIX", "")))
    manifest = convert([source], "a", tmp_path / "out", settings)
    assert set(manifest.targets) == set(NAMES.values())
    strict = load_convert_settings(settings_file(tmp_path, spin.replace("true", "false")))
    with pytest.raises(SourceError, match=r"no training structure has the target 'spin' .*or set optional = true"):
        convert([source], "a", tmp_path / "other", strict)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[targets.gap]\nfield = "gap"\nunit = "hartee"', "settings.toml: targets.gap.unit: .*did you mean 'Hartree'"),
        ('[targets.gap_mask]\nfield = "gap"', "must be a word without '_mask'"),
        ('[targets."band gap"]\nfield = "gap"', "targets.band gap: the name must be a word"),
        ('[targets.mu]\nfield = "mu"\nkind = "vector"\nabsolute = true', "absolute is for scalars alone"),
        ('[targets.gap]\nunit = "eV"', "targets.gap.field is missing"),
        ('[labels]\nrequire = ["forces"]', "must hold 'energy', unless there are"),
    ],
)
def test_settings_that_cannot_be(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        load_convert_settings(settings_file(tmp_path, text))


def test_arrays_of_another_length(tmp_path):
    arrays = ragged()
    settings = load_convert_settings(settings_file(tmp_path, READING[npz] + TARGETS.replace("PREFIX", "")))
    np.savez(tmp_path / "a.npz", **{**arrays, "q": arrays["q"][:-1]})
    with pytest.raises(SourceError, match="'q' has shape"):
        convert([tmp_path / "a.npz"], "a", tmp_path / "out", settings)
    positions = np.random.default_rng(0).normal(size=(20, 3, 3)) + 3 * np.eye(3)
    one = {"z": [8, 1, 1], "R": positions, "E": np.zeros(20), "F": np.zeros((20, 3, 3)), "q": np.zeros((19, 3))}
    np.savez(tmp_path / "b.npz", **one)
    settings = load_convert_settings(settings_file(tmp_path, '[targets.charges]\nfield = "q"\nof = "atom"'))
    with pytest.raises(SourceError, match=r"'q' has shape \(19, 3\), where 20 frames of 3 atoms need \(20, 3\)"):
        convert([tmp_path / "b.npz"], "b", tmp_path / "out", settings)


def test_what_inspect_shows_and_shards_from_before_targets(tmp_path):
    settings = load_convert_settings(settings_file(tmp_path, TARGETS.replace("PREFIX", "")))
    convert([extxyz(tmp_path)], "a", tmp_path / "a", settings)
    manifest = read_manifest(tmp_path / "a")
    console = Console(width=80, record=True, file=StringIO())
    console.print(describe(manifest))
    text = console.export_text()
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "a"), "--html", str(page)])
    assert result.exit_code == 0 and "…" not in text
    training = structures_in(tmp_path / "a")[: manifest.structures("train")]
    known = sum("gap" in structure.targets for structure in training)
    assert manifest.targets["gap"].count == known < len(training)
    facts = manifest.targets["gap"]
    shown = (f"{known / len(training):.1%}", f"{facts.minimum:.4g}", f"{facts.maximum:.4g}", "gap (structure, eV)")
    html = page.read_text()
    assert all(word in html for word in shown) and "atom_dipoles (atom vector, eÅ)" in html
    assert all(word in text for word in shown[:3])
    # A manifest of before targets has no such field.
    document = json.loads((tmp_path / "a" / "manifest.json").read_text())
    del document["targets"]
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(document))
    assert read_manifest(tmp_path / "a").targets == {}
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "a")]).exit_code == 0


def test_one_name_for_two_things(tmp_path):
    source, facts = extxyz(tmp_path), []
    for task, unit in (("hartree", "Hartree"), ("ev", "eV"), ("bare", "")):
        text = f'[targets.gap]\nfield = "gap"\nunit = "{unit}"\n'
        manifest = convert([source], task, tmp_path / task, load_convert_settings(settings_file(tmp_path, text)))
        facts.append(task_facts(TaskSection(name=task, shards=str(tmp_path / task)), manifest))
    assert targets_of(facts[:2])["gap"].unit == "eV"
    with pytest.raises(ConfigError, match=r"'gap' is .* in 'eV' in task 'hartree' and .* in '' in task 'bare'"):
        targets_of(facts)


def test_one_geometry_is_the_same_whatever_its_targets():
    atoms = molecules(1)[0]
    parts = {"numbers": atoms.numbers.astype(np.uint8), "positions": atoms.positions, "cell": np.zeros((3, 3))}
    bare = Structure(**parts, pbc=np.zeros(3, dtype=bool))
    with_gap = Structure(**parts, pbc=np.zeros(3, dtype=bool), targets={"gap": np.array(1.0)})
    assert bare.geometry_hash() == with_gap.geometry_hash()


def test_units():
    for unit, factor in (("muB", 1.0), ("µB", 1.0), ("\u03bcB", 1.0), ("Å³", 1.0), ("Bohr^3", units.Bohr**3)):
        assert target_value("x", TargetSection(field="x", unit=unit), 2.0, 1) == pytest.approx(2.0 * factor, rel=1e-14)
    with pytest.raises(ValueError, match="unit 'Bohr' of a target is not known"):
        TargetSection(field="x", unit="Bohr")
