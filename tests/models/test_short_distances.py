"""Atoms closer than in the training data of a task: found in batches, said by predictions and marked in screens."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from ase.build import molecule
from ase.optimize import FIRE
from click.testing import CliRunner
from sources import write_extxyz
from structures import CUTOFF, batch_of, facts, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.launch.cli.main import main
from hydrazero.models import Potential, load_model, save_model
from hydrazero.models.inference.extrapolation import ExtrapolationWarning
from hydrazero.models.inference.short_distances import ROUNDING, ShortDistances, bounds_table
from hydrazero.models.screening import FunctionSource, ScreenPlan, ScreenSettings, screen
from hydrazero.models.screening.part_files import CHUNKS_KEY, read_chunk_records, write_part
from hydrazero.models.screening.settings import CHUNK
from hydrazero.shards.graphs.graph import graph_sample

CLOSEST = {"H-O": 0.9, "H-H": 1.4, "H-C": 1.0, "C-C": 1.45, "Na-Cl": 2.5}
TASKS = [
    facts("near", closest=CLOSEST, closest_within=0.95),
    facts("far", closest={"Na-Na": 4.2, "H-H": 1.7}, closest_within=1.2),
    facts("water", closest={"H-H": 3.9}, closest_within=0.5, elements=["H", "O"]),
    facts("unknown"),
]


def in_a_short_cell() -> Atoms:
    """Return ethane in a cell that is 0.5 Å long, so that its atoms meet their own images."""
    return Atoms("C2H6", molecule("C2H6").positions, cell=[0.5, 12.0, 12.0], pbc=[True, False, False])


def of_one_pair(first: int, second: int, task: int) -> float:
    table = {**TASKS[task].closest}
    symbols = {1: "H", 6: "C", 8: "O", 11: "Na", 17: "Cl"}
    if not {symbols[first], symbols[second]} <= set(TASKS[task].elements):
        return 0.0
    pair = "-".join(symbols[z] for z in sorted((first, second)))
    return min(table.get(pair, TASKS[task].closest_within), CUTOFF)


def test_bounds_hold_for_both_orders_and_for_elements_of_the_task_alone():
    for task in range(len(TASKS)):
        table = bounds_table(TASKS[task], CUTOFF)
        for first in (1, 6, 8, 11, 17):
            for second in (1, 6, 8, 11, 17):
                low, high = sorted((first, second))
                assert table[first, second] == pytest.approx(max(of_one_pair(low, high, task) - ROUNDING, 0.0))
        assert not table[26].any()


def test_samples_and_batches_give_the_worst_pairs_of_a_complete_search():
    many = [rattled_molecule("CH3CH2OH", seed, 0.15) for seed in range(4)] + [rattled_crystal(seed) for seed in (1, 2)]
    structures = [to_structure(atoms) for atoms in [*many, Atoms("H"), in_a_short_cell(), molecule("H2O")]]
    samples = [graph_sample(structure, 0, CUTOFF) for structure in structures]
    search = ShortDistances(TASKS, CUTOFF)
    found = search.of_samples(samples)
    assert {pair.task for pair in found} == {0, 1, 2}
    expected = {}
    for place, sample in enumerate(samples):
        pairs, numbers = sample.pairs, sample.structure.numbers.tolist()
        lengths = pairs.lengths(sample.structure.positions)
        for first, second, length in zip(pairs.first, pairs.second, lengths, strict=True):
            for task in range(len(TASKS)):
                bound = of_one_pair(*sorted((numbers[first], numbers[second])), task) - ROUNDING
                if length < bound:
                    expected[place, task] = min(expected.get((place, task), np.inf), length / bound)
    ratio = {}
    for pair in found:
        bound = of_one_pair(*sorted(pair.numbers), pair.task) - ROUNDING
        ratio[pair.structure, pair.task] = pair.distance / bound
        ends = structures[pair.structure].numbers[list(pair.atoms)]
        assert sorted(pair.numbers) == sorted(ends.tolist())
    assert ratio == pytest.approx(expected) and list(ratio) == sorted(expected)
    of_batch = search.of_batch(batch_of(structures, extra=(2, 5, 3)))
    assert [(p.structure, p.task) for p in of_batch] == list(ratio)
    np.testing.assert_allclose([p.distance for p in of_batch], [p.distance for p in found], atol=1e-6)
    assert search.of_samples([]) == [] and ShortDistances(TASKS[3:], CUTOFF).of_samples(samples) == []


@pytest.fixture
def potential() -> Potential:
    model = small_model()
    model.tasks = [replace(TASKS[0], name="task0"), replace(TASKS[3], name="task1")]
    return Potential(model)


def said(call) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [one for one in caught if issubclass(one.category, ExtrapolationWarning)]


def test_predictions_warn_of_the_first_structure(potential, monkeypatch):
    monkeypatch.setattr("hydrazero.models.inference.potential.STRUCTURES_AT_ONCE", 2)
    near = molecule("H2O")
    near.set_distance(0, 1, 0.6, fix=0)
    (one,) = said(lambda: potential.predict([molecule("H2O"), molecule("CH4"), molecule("H2O"), near, near]))
    assert str(one.message) == (
        "atoms 0 and 1 of structure 3 (H-O) are 0.60 Å apart; these elements have a smallest distance of 0.90 Å in "
        "the training data of task 'task0'."
    )
    assert not said(lambda: potential.predict([near], tasks="task1"))
    (one,) = said(lambda: potential.predict(Atoms("C", cell=[0.5, 9, 9], pbc=[True, False, False])))
    assert str(one.message).startswith("atom 0 of structure 0 and its periodic image (C-C) are 0.50 Å apart; ")


def test_warnings_point_to_the_line_of_the_user(potential):
    near = molecule("H2O")
    near.set_distance(0, 1, 0.6, fix=0)
    calls = [lambda: potential.predict([near])]
    for use in (lambda atoms: atoms.get_forces(), lambda atoms: FIRE(atoms, logfile=None).run(steps=1)):
        atoms = near.copy()
        atoms.calc = potential.calculator("task0")
        calls.append(lambda use=use, atoms=atoms: use(atoms))
    for call in calls:
        (one,) = said(call)
        assert Path(one.filename) == Path(__file__), one.filename


def test_models_of_torch_sim_warn(potential):
    ts = pytest.importorskip("torch_sim")
    near = molecule("H2O")
    near.set_distance(0, 1, 0.6, fix=0)
    model, state = potential.torch_sim("task0"), ts.io.atoms_to_state([molecule("CH4"), near], "cpu", None)
    (one,) = said(lambda: model(state))
    assert "atoms 0 and 1 of H2O (H-O) are 0.60 Å apart" in str(one.message) and one.filename == __file__
    assert not said(lambda: model(state))


@pytest.fixture
def model(potential, tmp_path) -> Path:
    save_model(potential.model, tmp_path / "m.safetensors", dtype="float64")
    return tmp_path / "m.safetensors"


def frames() -> list[Atoms]:
    return [molecule("CH4"), molecule("H2O"), in_a_short_cell(), molecule("C2H6"), in_a_short_cell()]


@pytest.mark.parametrize("options", [(), ("--workers", "0"), ("--relax", "1")])
def test_screens_mark_and_count_them(model, tmp_path, options):
    if "--relax" in options:
        pytest.importorskip("torch_sim")
    source, out = write_extxyz(tmp_path / "s.extxyz", frames()), tmp_path / "s.parquet"
    with pytest.warns(
        ExtrapolationWarning, match=r"of s.extxyz#2 \(.* Å apart; .*; further structures are not named\.$"
    ) as found:
        done = CliRunner().invoke(main, ["screen", *map(str, (model, source, "--out", out)), *options])
    assert done.exit_code == 0 and len(found) == 1, done.output
    table = pq.read_table(out)
    assert table["too_close_task0"].to_pylist() == [False, False, True, False, True]
    assert "too_close_task1" not in table.column_names  # the smallest distances in its data are unknown
    assert "closer than in the training data: 2 (task0); the columns 'too_close_TASK' mark them\n" in done.output


def test_a_list_leaves_them_out(model, tmp_path):
    source, out = write_extxyz(tmp_path / "s.extxyz", frames()), tmp_path / "s.parquet"
    words = ["screen", str(model), str(source), "--top", "4", "--workers", "0", "--tasks", "task0"]
    done = CliRunner().invoke(main, [*words, "--out", str(out)])
    hint = '--by "(interaction_per_atom_task0) / (1 - too_close_task0)" leaves them out'
    assert hint in done.output and any(pq.read_table(out)["too_close_task0"].to_pylist())
    by = hint.split('"')[1]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "t.parquet"), "--by", by])
    kept = pq.read_table(tmp_path / "t.parquet")
    assert sorted(kept["index"].to_pylist()) == [0, 1, 3] and "leaves them out" not in done.output
    assert kept["interaction_per_atom_task0"].to_pylist() == sorted(kept["interaction_per_atom_task0"].to_pylist())


@pytest.mark.compiler
def test_neighbours_that_are_found_on_the_device_give_the_same(model, tmp_path):
    pytest.importorskip("nvalchemiops")
    made = [
        to_structure(atoms, f"#{n}") for n, atoms in enumerate([*frames(), *(rattled_crystal(n) for n in range(4))])
    ]
    settings, marked = ScreenSettings(tasks=("task0",)), {}
    for on_device in (True, False):
        out, plan = tmp_path / f"{on_device}.parquet", ScreenPlan(workers=0, device_neighbours=on_device)
        summary = screen(load_model(model), [FunctionSource("made", lambda: made)], out, settings, plan)
        marked[on_device] = pq.read_table(out)["too_close_task0"].to_pylist()
        assert summary.totals is not None and summary.totals["too_close"] == {"task0": sum(marked[on_device])}
    assert marked[True] == marked[False] and sum(marked[True]) >= 2


@pytest.mark.parametrize("top", [None, 5])
@pytest.mark.parametrize("out", ["s.parquet", "s"])
def test_parts_of_earlier_versions_are_merged(model, tmp_path, out, top):
    """A screen that an earlier version began, whose parts lack the columns, is finished."""
    count = CHUNK + 676
    made = [to_structure(rattled_molecule("H2O", n % 7), f"#{n}") for n in range(count)]
    source = FunctionSource("waters", lambda: made, count)
    settings, done = ScreenSettings(tasks=("task0",), top=top), []

    class Stop(Exception):
        pass

    def stop(structures: int) -> None:
        done.append(structures)
        if sum(done) > CHUNK + 300:
            raise Stop

    plan = ScreenPlan(workers=0, atoms=300)
    with pytest.raises(Stop):
        screen(load_model(model), [source], tmp_path / out, settings, plan, stop)
    parts = tmp_path / (f".{out}.parts" if out.endswith("parquet") else out)
    (part,) = parts.glob("part-*.parquet")
    records = {n: replace(record, too_close={}) for n, record in read_chunk_records(part).items()}
    old = pq.read_table(part).drop_columns(["too_close_task0"])
    part.unlink()
    part = write_part(parts, [old], records)
    assert len(json.loads(pq.read_schema(part).metadata[CHUNKS_KEY])[0]) == 3
    summary = screen(load_model(model), [source], tmp_path / out, settings, plan)
    assert summary.totals is not None and summary.totals["written"] == (top or count)
    table = pq.read_table(tmp_path / out / "top.parquet" if top and out == "s" else tmp_path / out)
    assert table.schema.field("too_close_task0").type == pa.bool_()
    rows = {row["index"]: row["too_close_task0"] for row in table.to_pylist()}
    assert all((value is None) == (index < CHUNK) for index, value in rows.items())
    assert len(rows) == (top or count)
