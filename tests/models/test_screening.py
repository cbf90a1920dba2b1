"""Screening: each structure gets one row with the numbers of every head, also after errors, kills and on many ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import labelled, make_shards, molecules, write_extxyz
from structures import facts, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.launch.cli.main import main
from hydrazero.models import load_model, save_model
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.screening import FunctionSource, ScreenPlan, ScreenSettings, screen, sources_of
from hydrazero.models.screening.predictor import Predictor
from hydrazero.models.screening.ranking import TopRows
from hydrazero.models.screening.relaxation import Relaxer
from hydrazero.models.screening.samples import RejectedStructureError
from hydrazero.models.screening.settings import CHUNK
from hydrazero.models.screening.sources import Item
from hydrazero.shards.errors import ConfigError, SourceError
from hydrazero.shards.readers.frames import ReadSettings, SourceUnits

IN_PROCESS = ScreenPlan(workers=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of two tasks, the second of which was not trained on carbon."""
    small = small_model(dtype=torch.float32)
    small.tasks[1] = facts("task1", scale=2.0, elements=["H", "O"])
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_model(small, path)
    return path


def command(*arguments: object):
    return CliRunner().invoke(main, ["screen", *map(str, arguments)])


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def waters(count: int) -> FunctionSource:
    def make():
        for seed in range(count):
            yield to_structure(rattled_molecule("H2O" if seed % 3 else "CH4", seed), f"made#{seed}")

    return FunctionSource(f"{count} molecules", make, count)


def test_every_head_gives_what_predictions_give(model, tmp_path):
    frames = [rattled_molecule(name, seed) for seed in range(60) for name in ("H2O", "CH4")]
    frames.append(rattled_crystal(1))
    source, out = write_extxyz(tmp_path / "s.extxyz", frames), tmp_path / "all.parquet"
    done = command(model, source, "--out", out, "--forces")
    assert done.exit_code == 0 and "121 of 121 structures" in done.output, done.output
    rows = rows_of(out)
    assert [row["source_id"] for row in rows] == [f"s.extxyz#{n}" for n in range(121)]
    expected = load_model(model).predict(frames, tasks=["task0"])
    for row, want in zip(rows, expected, strict=True):
        assert row["energy_task0"] == pytest.approx(want["energy"], abs=2e-5)
        np.testing.assert_allclose(np.reshape(row["forces_task0"], (-1, 3)), want["forces"], atol=1e-4)
        longest = np.linalg.norm(want["forces"], axis=1).max()
        assert row["max_force_task0"] == pytest.approx(longest, abs=1e-4)
        assert (row["energy_task1"] is None) == (set(row["formula"]) & set("CN") != set())  # it lacks C, Na, Cl
    assert "forces_task1" not in rows[0] and {row["reason"] for row in rows} == {None}


def test_ensembles_give_a_spread(tmp_path):
    alone = small_model()
    ensemble = AtomisticModel(alone.settings.model_copy(update={"ensemble": 3}), alone.tasks)
    save_model(ensemble, tmp_path / "m.safetensors")
    potential, atoms = load_model(tmp_path / "m.safetensors"), rattled_molecule("H2O")
    settings = ScreenSettings(tasks=("task1",))
    screen(
        potential, [FunctionSource("one", lambda: [to_structure(atoms)])], tmp_path / "s.parquet", settings, IN_PROCESS
    )
    (row,) = rows_of(tmp_path / "s.parquet")
    (want,) = potential.predict([atoms], tasks=["task1"])
    assert row["energy_spread_task1"] == pytest.approx(want["energy_spread"], rel=1e-4)


def test_a_structure_that_cannot_be_computed_is_a_row_with_a_reason(model, tmp_path):
    on_top = Atoms("OH2", positions=[[0, 0, 0], [0, 0, 0.01], [0, 1, 0]])
    frames = [rattled_molecule("H2O"), bulk("Au", cubic=True), bulk("Na", cubic=True) * (6, 6, 6), on_top]
    source, out = write_extxyz(tmp_path / "s.extxyz", frames), tmp_path / "s.parquet"
    cut = write_extxyz(tmp_path / "cut.extxyz", [rattled_molecule("H2O", seed) for seed in range(3)])
    cut.write_text(cut.read_text()[:-150])
    shards = make_shards(tmp_path, "t", molecules(20))
    tar = next(shards.glob("train-*.tar"))
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(bytes(content))
    done = command(model, source, cut, shards, "--out", out, "--max-atoms", 400)
    assert done.exit_code == 0, done.output
    rows = rows_of(out)
    reasons = [row["reason"] for row in rows]
    assert reasons[0] is None and rows[0]["energy_task0"] is not None
    assert "holds Au, which none of the tasks task0, task1 was trained on" in reasons[1] and rows[1]["formula"] == "Au4"
    assert "has 432 atoms, more than --max-atoms 400" in reasons[2]
    assert "at the same place" in reasons[3]
    broken = [row for row in rows if row["reason"] and ("cut.extxyz" in row["reason"] or "checksum" in row["reason"])]
    assert any("cut.extxyz" in row["reason"] for row in broken) and any("checksum" in row["reason"] for row in broken)
    assert [row["index"] for row in rows] == list(range(len(rows)))
    whole = sum(reason is not None for reason in reasons)
    assert f"{whole} not computed" in done.output and "1 too large" in done.output


@pytest.mark.parametrize("by", ["", "abs(energy_task0 - energy_task1) / atoms", "-max_force_task0"])
def test_the_top_is_that_of_the_complete_screen(model, tmp_path, by):
    potential, source = load_model(model), waters(300)
    whole = ScreenSettings(tasks=("task0", "task1"), forces=("task0",))
    screen(potential, [source], tmp_path / "all.parquet", whole, IN_PROCESS)
    screen(potential, [source], tmp_path / "top", replace(whole, top=17, by=by), IN_PROCESS)
    rows = rows_of(tmp_path / "all.parquet")
    value = {
        "": lambda row: row["interaction_per_atom_task0"],
        "-max_force_task0": lambda row: -row["max_force_task0"],
    }.get(by, lambda row: abs(row["energy_task0"] - row["energy_task1"]) / row["atoms"])
    known = [row for row in rows if row["energy_task1"] is not None or "task1" not in by]
    best = sorted(known, key=value)[:17]
    assert rows_of(tmp_path / "top" / "top.parquet") == best


VALUES = st.sampled_from([0.5, 1.0, 2.0, 3.0, float("nan")])


@given(st.lists(st.lists(VALUES, max_size=40), max_size=60), st.integers(1, 50))
@settings(max_examples=50)
def test_top_rows_of_tables(values, top):
    schema = pa.schema([("index", pa.int64()), ("energy_a", pa.float64()), ("reason", pa.string())])
    best = TopRows(ScreenSettings(tasks=("a",), top=top, by="energy_a"), schema)
    rows, everything = 0, []
    for part in values:
        numbers = range(rows, rows + len(part))
        energies, reasons = pa.array(part, pa.float64()), pa.nulls(len(part), pa.string())
        best.add(pa.table({"index": numbers, "energy_a": energies, "reason": reasons}, schema))
        everything += [(value, rows + n) for n, value in enumerate(part) if value == value]
        rows += len(part)
    if values:
        assert best.table()["index"].to_pylist() == [index for _, index in sorted(everything)[:top]]


def test_a_killed_screen_resumes(model, tmp_path):
    """A screen that is killed and resumed with another number of ranks gives each structure once."""
    count = 6 * CHUNK + 100
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import hydrazero.models.screening.part_files as parts; parts.PART_SECONDS = 0.0
from test_screening import *
out = Path({str(tmp_path / "s.parquet")!r})
screen(load_model({str(model)!r}), [waters({count})], out, ScreenSettings(tasks=("task0",)))
"""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    parts = tmp_path / ".s.parquet.parts"
    while not list(parts.glob("part-*.parquet")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    assert not (tmp_path / "s.parquet").exists()
    potential, settings_ = load_model(model), ScreenSettings(tasks=("task0",))
    with pytest.raises(SourceError, match=r"other settings \(tasks\)"):
        screen(potential, [waters(count)], tmp_path / "s.parquet", replace(settings_, tasks=("task1",)), IN_PROCESS)
    with pytest.raises(SourceError, match="other sources"):
        screen(potential, [waters(7)], tmp_path / "s.parquet", settings_, IN_PROCESS)
    seen = 0
    for rank in (1, 0, 2):
        assert all(path.stat().st_mtime_ns == time_ for path, time_ in there.items())
        plan = ScreenPlan(rank=rank, ranks=3, workers=0)
        summary = screen(potential, [waters(count)], tmp_path / "s.parquet", settings_, plan)
        seen += summary.structures
    assert summary.totals == {"structures": count, "written": count, "refused": {}, "too_close": {}}
    assert 0 < seen < count  # complete chunks are not computed again
    table = pq.read_table(tmp_path / "s.parquet")
    assert table["index"].to_pylist() == list(range(count)) and not parts.exists()
    expected = potential.predict([rattled_molecule("H2O", 6 * CHUNK + 1)], tasks=["task0"])[0]["energy"]
    assert table["energy_task0"][6 * CHUNK + 1].as_py() == pytest.approx(expected, abs=1e-5)


def test_ranks_of_a_launcher_share_a_screen(model, tmp_path, monkeypatch):
    frames = [rattled_molecule("H2O", seed) for seed in range(50)]
    shards = make_shards(tmp_path, "t", molecules(CHUNK + 200))
    source = write_extxyz(tmp_path / "s.extxyz", frames)
    out = tmp_path / "screened"
    line = [sys.executable, "-m", "hydrazero.launch.cli.main"]
    words = ["screen", str(model), str(source), str(shards), "--out", str(out), "--ranks", "2", "--tasks", "task0"]
    line = [str(Path(sys.executable).with_name("hydrazero")), *words]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    total = CHUNK + 250
    assert f"of {total:,} structures computed" in done.stdout
    rows = [row for path in out.glob("part-*.parquet") for row in rows_of(path)]
    assert Counter(row["index"] for row in rows) == Counter(range(total))
    assert len(list(out.glob("part-*.parquet"))) == 2  # each rank has computed a chunk
    again = command(model, source, shards, "--out", out, "--tasks", "task0")
    assert again.exit_code == 1 and "complete" in again.output


def test_forces_stay_with_their_structures(model, tmp_path):
    """Forces belong to the right structures even if a head does not support every second structure."""
    frames = [rattled_molecule(name, seed) for seed in range(5) for name in ("H2O", "CH4")]
    source, out = write_extxyz(tmp_path / "s.extxyz", frames), tmp_path / "s.parquet"
    assert command(model, source, "--out", out, "--forces", "--forces-of", "task1").exit_code == 0
    waters_alone = load_model(model).predict(frames[::2], tasks=["task1"])
    for place, row in enumerate(rows_of(out)):
        assert len(row["forces_task0"]) == 3 * row["atoms"]
        if place % 2:
            assert row["forces_task1"] is None and row["max_force_task1"] is None
        else:
            want = waters_alone[place // 2]["forces"]
            np.testing.assert_allclose(np.reshape(row["forces_task1"], (-1, 3)), want, atol=1e-4)


def test_structures_without_numbers_are_never_in_the_top(model, tmp_path):
    source = write_extxyz(tmp_path / "s.extxyz", [rattled_molecule(n, 0) for n in ("H2O", "CH4", "CH3CH2OH", "H2O")])
    for by in ("-atoms", "where(energy_task1 > -1e9, 1, 0)", "energy_task1**0"):
        out = tmp_path / f"{len(by)}.parquet"
        done = command(model, source, "--out", out, "--top", 4, f"--by={by}", "--max-atoms", 5)
        assert done.exit_code == 0, done.output
        names = ["H2O", "H2O"] if "task1" in by else ["CH4", "H2O", "H2O"]
        assert sorted(row["formula"] for row in rows_of(out)) == names
        if "task1" in by:
            assert f"\nnot ranked, without a value of '{by}': 1 (" in done.output, done.output
    by = "sqrt(0 * energy_task0 - 1)"
    done = command(model, source, "--out", tmp_path / "n.parquet", "--top", 4, f"--by={by}")
    assert done.exit_code == 1 and f"no structure has a value of '{by}'" in done.output, done.output


def test_tasks_whose_names_differ_in_a_dash(tmp_path):
    small = small_model(dtype=torch.float32)
    small.tasks = [facts("a-b", scale=1.0), facts("a_b", scale=2.0)]
    save_model(small, tmp_path / "m.safetensors")
    frames = [rattled_molecule("H2O", seed) for seed in range(12)]
    source = write_extxyz(tmp_path / "s.extxyz", frames)
    for task in ("a-b", "a_b"):
        out, by = tmp_path / f"{task}.parquet", f"-interaction_per_atom_{task}"
        assert command(tmp_path / "m.safetensors", source, "--out", out, "--top", 3, f"--by={by}").exit_code == 0
        rows = rows_of(out)
        assert rows == sorted(rows, key=lambda row: -row[f"interaction_per_atom_{task}"])


def test_atoms_without_neighbours(model, tmp_path):
    source = write_extxyz(tmp_path / "s.extxyz", [Atoms("H"), Atoms("OH", positions=[[0, 0, 0], [0, 0, 30]])])
    done = command(model, source, "--out", tmp_path / "s.parquet")
    assert done.exit_code == 0 and all(row["energy_task0"] is not None for row in rows_of(tmp_path / "s.parquet"))


def test_two_processes_at_the_same_work_lose_and_double_nothing(model, tmp_path, monkeypatch):
    """This happens if a launcher's variables are unknown, so that each process believes to be the only one."""
    monkeypatch.setattr("hydrazero.models.screening.part_files.PART_SECONDS", 0.0)
    potential, settings_, out = load_model(model), ScreenSettings(tasks=("task0",)), tmp_path / "s.parquet"
    count = 3 * CHUNK

    class Interrupted(Exception):
        pass

    def begin(rank: int, ranks: int, after: int) -> None:
        seen = Counter[str]()

        def stop(structures: int) -> None:
            seen["all"] += structures
            if seen["all"] >= after:
                raise Interrupted

        with pytest.raises(Interrupted):
            screen(potential, [waters(count)], out, settings_, ScreenPlan(rank=rank, ranks=ranks, workers=0), stop)

    begin(0, 2, CHUNK + 400)
    parts = tmp_path / ".s.parquet.parts"
    (first,) = parts.glob("part-*.parquet")
    content = first.read_bytes()
    first.unlink()
    begin(0, 1, 2 * CHUNK + 400)
    first.write_bytes(content)  # the part of the other process, so that one chunk is in two parts
    summary = screen(potential, [waters(count)], out, settings_, IN_PROCESS)
    assert summary.totals == {"structures": count, "written": count, "refused": {}, "too_close": {}}
    assert pq.read_table(out)["index"].to_pylist() == list(range(count))


def test_a_rank_that_is_late_finds_nothing_to_do(model, tmp_path):
    potential, settings_, out = load_model(model), ScreenSettings(tasks=("task0",)), tmp_path / "s.parquet"
    for rank, whole, late in ((0, False, False), (1, True, False), (1, False, True)):
        plan = ScreenPlan(rank=rank, ranks=2, workers=0)
        summary = screen(potential, [waters(20)], out, settings_, plan)
        assert (summary.totals is not None, summary.was_complete) == (whole, late)
    for other in (replace(plan, model_id="another"), IN_PROCESS):
        with pytest.raises(SourceError, match="exists"):
            screen(potential, [waters(20)], out, settings_, other)


def test_ranks_of_two_starts_leave_each_structure_once_in_a_folder(model, tmp_path):
    """This happens if a node that was believed lost still runs, while its job continues with fewer nodes."""
    potential, settings_, out = load_model(model), ScreenSettings(tasks=("task0",)), tmp_path / "s"
    count = 3 * CHUNK + 50
    held = tmp_path / "held"

    def part(ranks: int) -> None:
        screen(potential, [waters(count)], out, settings_, ScreenPlan(rank=0, ranks=ranks, workers=0))

    part(2)
    (first,) = out.glob("part-*.parquet")
    first.rename(held)
    part(1000)
    held.rename(first)  # one part has chunks 0 and 2, the other has chunk 0
    summary = screen(potential, [waters(count)], out, settings_, IN_PROCESS)
    assert summary.totals == {"structures": count, "written": count, "refused": {}, "too_close": {}}
    assert sorted(pq.read_table(out)["index"].to_pylist()) == list(range(count))
    assert {path.name.split("-")[0] for path in out.iterdir()} == {"part", "_screen.json", "_summary.json"}


def test_workers_end_with_their_rank(model, tmp_path):
    """Workers of a killed rank end; otherwise they would wait for ever to pass a batch on, and keep the rank's lock."""
    code = f"""
import sys, time; sys.path[:0] = {sys.path!r}
from test_screening import *
from hydrazero.models.screening.predictor import Predictor
compute = Predictor._compute
Predictor._compute = lambda self, model, batch: time.sleep(0.5) or compute(self, model, batch)
plan, out = ScreenPlan(workers=3, atoms=512), Path({str(tmp_path / "s.parquet")!r})
screen(load_model({str(model)!r}), [waters(20 * CHUNK)], out, ScreenSettings(tasks=("task0",)), plan, print)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()  # one batch is done, and more are waiting
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 3
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_structure_that_memory_or_numbers_fail_is_a_row(model, tmp_path, monkeypatch):
    compute = Predictor._compute

    def failing(self, model, batch):
        if len(batch.numbers) > 40:
            raise torch.OutOfMemoryError("out of memory")
        found = compute(self, model, batch)
        found.members[batch.n_atoms == 5] = torch.nan
        return found

    monkeypatch.setattr(Predictor, "_compute", failing)
    frames = [rattled_molecule("H2O"), rattled_molecule("CH4"), rattled_crystal() * (3, 3, 3)]
    source, out = write_extxyz(tmp_path / "s.extxyz", frames), tmp_path / "s.parquet"
    done = command(model, source, "--out", out, "--batch-atoms", 30)
    assert "1 of 3 structures computed" in done.output and "1 not finite, 1 out of memory" in done.output, done.output
    reasons = [row["reason"] for row in rows_of(out)]
    assert reasons[0] is None and reasons[2] == "it does not fit into the GPU's memory"
    assert reasons[1] == "its energy_task0 is not a finite number"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_cannot_be_read_is_named(model, tmp_path, workers):
    def broken():
        yield from (to_structure(rattled_molecule("H2O", seed), f"s#{seed}") for seed in range(3 * CHUNK))
        raise OSError(5, "Input/output error", "far.xyz")

    plan, settings_ = ScreenPlan(workers=workers), ScreenSettings(tasks=("task0",))
    with pytest.raises(
        SourceError, match=r"^far.xyz cannot be read \(Input/output error\); start again once it can be read.$"
    ):
        screen(load_model(model), [FunctionSource("broken", broken)], tmp_path / "s.parquet", settings_, plan)


def test_files_of_one_name_are_distinguished(model, tmp_path):
    for folder in ("a/x", "b/x", "c"):
        (tmp_path / folder).mkdir(parents=True)
        write_extxyz(tmp_path / folder / "s.extxyz", [rattled_molecule("H2O")])
    command(model, tmp_path / "a", tmp_path / "b", tmp_path / "c", "--out", tmp_path / "s.parquet")
    names = [row["source_id"] for row in rows_of(tmp_path / "s.parquet")]
    assert names == ["a/x/s.extxyz#0", "b/x/s.extxyz#0", "c/s.extxyz#0"]


def test_nothing_computed_is_an_error_with_its_rows(model, tmp_path):
    """Structures with unknown elements, or with atoms too far apart for a neighbour list, are rows with a reason."""
    far = rattled_molecule("CH3CH2OH")
    far.positions[0, 0] += 1e6
    source, out = write_extxyz(tmp_path / "s.extxyz", [bulk("Au"), far]), tmp_path / "s.parquet"
    done = command(model, source, "--out", out)
    assert done.exit_code == 1 and "no structure could be computed" in done.output, done.output
    assert "far apart" in done.output and "times the cutoff" in rows_of(out)[1]["reason"]
    assert rows_of(out)[1]["formula"] == "C2H6O" and rows_of(out)[1]["atoms"] == 9


def test_many_sources_are_not_all_looked_at(model, tmp_path):
    looked = []

    def source(number: int) -> FunctionSource:
        def make():
            looked.append(number)
            yield to_structure(rattled_molecule("H2O", number), f"s#{number}")

        return FunctionSource(str(number), make, 1)

    settings_ = ScreenSettings(tasks=("task0",))
    screen(load_model(model), [source(n) for n in range(300)], tmp_path / "s.parquet", settings_, IN_PROCESS)
    assert len(looked) <= 300 + 64


def test_a_screen_resumes_only_with_the_same_reading_settings(model, tmp_path, spec):
    source, out = write_extxyz(tmp_path / "s.extxyz", [rattled_molecule("H2O")]), tmp_path / "s.parquet"
    settings_ = ScreenSettings(tasks=("task0",))
    before = [each.identity() for each in [*sources_of([source]), *sources_like(spec)]]
    bulk("Na", cubic=True, a=5.0).write(tmp_path / "cell.cif")
    bohr = ReadSettings(units=SourceUnits(length="Bohr"))
    after = [each.identity() for each in [*sources_of([source], bohr), *sources_like(spec)]]
    assert before[0] != after[0] and before[1] != after[1]
    screen(load_model(model), sources_of([source]), out, settings_, IN_PROCESS)
    assert not list(tmp_path.glob(".s.parquet*"))  # neither parts nor locks


def test_an_output_that_cannot_be_written_is_one_sentence(model, tmp_path):
    source = write_extxyz(tmp_path / "s.extxyz", [rattled_molecule("H2O")])
    (tmp_path / "file").write_text("")
    done = command(model, source, "--out", tmp_path / "file" / "s.parquet")
    assert done.exit_code == 1 and "cannot be written" in done.output and done.output.count("\n") == 1, done.output


def test_labels_do_not_matter(model, tmp_path):
    atoms = labelled(rattled_molecule("H2O"))
    atoms.calc.results["energy"] = np.nan
    atoms.calc.results["forces"][1] = np.inf
    assert command(model, write_extxyz(tmp_path / "s.extxyz", [atoms]), "--out", tmp_path / "s.parquet").exit_code == 0
    structure = to_structure(atoms, energy=np.nan, forces=np.full((3, 3), np.nan))
    source = FunctionSource("one", lambda: [structure])
    screen(load_model(model), [source], tmp_path / "t.parquet", ScreenSettings(tasks=("task0",)), IN_PROCESS)
    ours, theirs = (rows_of(tmp_path / name)[0]["energy_task0"] for name in ("s.parquet", "t.parquet"))
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_relaxation_before_prediction(model, tmp_path):
    """Molecules, crystals and slabs are relaxed, and all heads get the relaxed structures; some cannot be relaxed."""
    pytest.importorskip("torch_sim")
    slab = rattled_crystal(2)
    slab.pbc = (True, True, False)
    frames = [*(rattled_molecule("H2O", seed) for seed in range(5)), rattled_crystal(1), slab, bulk("Au")]
    source, out = write_extxyz(tmp_path / "s.extxyz", frames), tmp_path / "s.parquet"
    done = command(model, source, "--out", out, "--relax", 40)
    assert done.exit_code == 0 and "1 not computed (1 that no head supports)" in done.output, done.output
    rows, potential = rows_of(out), load_model(model)
    before = potential.predict(frames[:7], tasks=["task0"])
    for row, atoms, start in zip(rows, frames, before, strict=False):
        first = np.linalg.norm(start["forces"], axis=1).max()
        if np.allclose(np.reshape(row["positions"], (-1, 3)), atoms.positions, atol=1e-7):  # nothing was to be done
            assert row["converged"] and first < 0.05
        else:
            assert row["energy_task0"] < start["energy"] - 1e-4 and row["max_force_task0"] < first
        relaxed = Atoms(atoms.numbers, np.reshape(row["positions"], (-1, 3)), cell=np.reshape(row["cell"], (3, 3)))
        relaxed.pbc = atoms.pbc
        (found,) = potential.predict([relaxed], tasks=["task0"])
        assert row["energy_task0"] == pytest.approx(found["energy"], abs=1e-3)
        assert row["converged"] == (row["max_force_task0"] < 0.05) or relaxed.pbc.any()
    assert rows[7]["converged"] is None and rows[7]["formula"] == "Au" and rows[7]["atoms"] == 1
    assert rows[7]["reason"] == "holds Au, which none of the tasks task0, task1 was trained on"
    refused = command(model, source, "--out", tmp_path / "t.parquet", "--relax", 4, "--tasks", "task1,task0")
    assert refused.exit_code == 0, refused.output
    reason = rows_of(tmp_path / "t.parquet")[5]["reason"]
    assert reason == "holds Cl, Na, which task 'task1' was not trained on, and --relax needs that task"


def test_relaxations_that_fail_say_why(model, monkeypatch):
    """Memory suffices for two structures, one relaxation fails, and an error that no structure causes is raised."""
    pytest.importorskip("torch_sim")
    relaxer = Relaxer(load_model(model), ["task0"], 5, 100)
    items = [Item(index=n, source_id=str(n), read=partial(to_structure, rattled_molecule("H2O", n))) for n in range(5)]
    relaxed, sizes = Relaxer.relaxed, []

    def failing(self, structures):
        sizes.append(len(structures))
        if len(structures) > 2:
            raise torch.OutOfMemoryError("out of memory")
        if any(np.allclose(s.positions, to_structure(rattled_molecule("H2O", 3)).positions) for s in structures):
            raise torch.linalg.LinAlgError("singular")
        return relaxed(self, structures)

    monkeypatch.setattr(Relaxer, "relaxed", failing)
    found = list(relaxer.items(items))
    assert sizes[0] == 5 and max(sizes[1:]) <= 3
    for item in found:
        if item.index == 3:
            with pytest.raises(RejectedStructureError, match=r"relaxation failed \(singular\)") as error:
                item.read()
            assert len(error.value.structure) == 3
        else:
            assert len(item.read()) == 3

    def broken(self, structures):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Relaxer, "relaxed", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        list(relaxer.items(items))


SPEC = """
[[prototypes]]
name = "rocksalt"
crystal = "rocksalt"
formula = "NaCl"
a = 5.6
sites = {Na = ["Na", "H", "Cl"], Cl = ["Cl", "O"]}
[[prototypes]]
name = "read"
file = "cell.cif"
repeat = [1, 1, 2]
sites = {Na = ["Na", "O"]}
[strains]
volumes = [0.9, 1.0, 1.1]
voigt = [[0, 0, 0, 0, 0, 0], [0.01, 0, 0, 0.02, 0, 0]]
"""


@pytest.fixture
def spec(tmp_path):
    bulk("Na", cubic=True).write(tmp_path / "cell.cif")
    path = tmp_path / "spec.toml"
    path.write_text(SPEC.replace("0, 0, 0, 0, 0, 0]", "0.0, 0.0, 0.0, 0.0, 0.0, 0.0]"))
    return path


def test_generated_structures(model, tmp_path, spec):
    """Generate 7 substitutions with 6 strains each.

    The first prototype has 3 x 2 substitutions, less one with the same element twice, and the second has 2.
    """
    out = tmp_path / "s.parquet"
    done = command(model, "--generate", spec, "--out", out, "--tasks", "task0")
    assert done.exit_code == 0 and "42 of 42 structures" in done.output, done.output
    rows = rows_of(out)
    assert [row["index"] for row in rows] == list(range(42)) and {row["reason"] for row in rows} == {None}
    assert rows[0]["source_id"] == "spec.toml#rocksalt:Na:Cl:v0.9:s0" and rows[0]["formula"] == "Cl4Na4"
    assert rows[36]["source_id"] == "spec.toml#read:O:v0.9:s0" and rows[36]["atoms"] == 4
    (source,) = sources_like(spec)
    middle = [item.read() for item in source.items(0, lambda chunk: True)][2]
    assert abs(np.linalg.det(middle.cell)) == pytest.approx(5.6**3)
    sheared = [item.read() for item in source.items(0, lambda chunk: True)][3]
    np.testing.assert_allclose(sheared.cell[0], [5.656, 0, 0], atol=1e-9)
    np.testing.assert_allclose(sheared.cell[1], [0, 5.6, 0.056], atol=1e-9)
    want = load_model(model).predict([bulk("NaCl", "rocksalt", a=5.6, cubic=True)], tasks=["task0"])[0]["energy"]
    assert rows[2]["energy_task0"] == pytest.approx(want, abs=2e-5)


def sources_like(spec: Path):
    from hydrazero.models.screening.prototypes import GeneratedSource

    return [GeneratedSource(spec)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('Na = ["Na", "H"', 'K = ["Na", "H"'), ("prototype 'rocksalt'", "no element 'K'")),
        (('"H", "Cl"]', '"Hh", "Cl"]'), ("sites.Na", "'Hh' is not an element")),
        (('crystal = "rocksalt"', 'crystal = "rocksat"'), ("prototype 'rocksalt' cannot be built",)),
        (('file = "cell.cif"', 'file = "no.cif"'), ("prototype 'read' cannot be built", "no.cif")),
        (("volumes = [0.9", "volumes = [-0.9"), ("strains.volumes",)),
        (("[strains]", "[strain]"), ("strain is not known", "strains")),
        (('name = "read"', 'name = "rocksalt"'), ("same name",)),
        (("[[prototypes]]", "[[prototypes"), ("not valid TOML",)),
    ],
)
def test_bad_specifications(model, tmp_path, spec, change, words):
    spec.write_text(spec.read_text().replace(*change, 1))
    done = command(model, "--generate", spec, "--out", tmp_path / "s.parquet")
    assert done.exit_code == 1 and all(word in done.output for word in words), done.output
    assert done.output.count("\n") == 1 and not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "taks0"], ("taks0", "did you mean 'task0'")),
        (["--by", "energy_task0"], ("--top",)),
        (["--top", 3, "--by", "energy_tsk0"], ("no column 'energy_tsk0'", "energy_task0")),
        (["--top", 3, "--by", "energy_task0 +"], ("is not an expression",)),
        (["--top", 3, "--by", "2 + 3"], ("names no column",)),
        (["--top", 3, "--by", "atoms * 9**9**9**9"], ("is not an expression", "out of range")),
        (["--top", 3, "--by", "sum(energy_task0)"], ("cannot be computed",)),
        (["--tasks", "task0,task0"], ("'task0' is named twice",)),
        (["--format", "extxz"], ("unknown format 'extxz'", "extxyz")),
        (["--forces-of", "task1", "--tasks", "task0"], ("'task1'", "not among the tasks")),
        (["--config", "no.toml"], ("no.toml", "cannot be read")),
    ],
)
def test_bad_options(model, tmp_path, options, words):
    source = write_extxyz(tmp_path / "s.extxyz", [rattled_molecule("H2O")])
    done = command(model, source, "--out", tmp_path / "s.parquet", *options)
    assert done.exit_code == 1 and all(word in done.output for word in words), done.output
    assert done.output.count("\n") == 1 and sorted(tmp_path.iterdir()) == [source]


def test_bad_sources_and_outputs(model, tmp_path):
    source, out = write_extxyz(tmp_path / "s.extxyz", [rattled_molecule("H2O")]), tmp_path / "s.parquet"
    for words, said in (
        ([tmp_path / "no.xyz", "--out", out], "no.xyz does not exist"),
        (["--out", out], "name what to screen"),
        ([source, "--out", model], "is a file"),
        ([source, "--out", source], "s.parquet, or a folder"),
        ([source, "--out", tmp_path / "t.csv"], "t.parquet, or a folder"),
        ([source, "--out", tmp_path], "no unfinished screen"),
    ):
        done = command(model, *words)
        assert done.exit_code == 1 and said in done.output and done.output.count("\n") == 1, done.output
    assert command(model, source, "--out", out).exit_code == 0
    assert "exists" in command(model, source, "--out", out).output
    with pytest.raises(SourceError, match="no structure"):
        screen(load_model(model), [FunctionSource("none", list)], tmp_path / "t", ScreenSettings(tasks=("task0",)))
    with pytest.raises(ConfigError, match="rank 3 of 2"):
        plan = ScreenPlan(rank=3, ranks=2)
        screen(load_model(model), sources_of([source]), tmp_path / "t", ScreenSettings(tasks=("task0",)), plan)


@pytest.mark.compiler
def test_compiled_and_eager_agree(model, tmp_path):
    settings_ = ScreenSettings(tasks=("task0", "task1"), forces=("task0",))
    for name, after in (("eager", float("inf")), ("compiled", 0.0)):
        plan = ScreenPlan(compile_after=after)
        summary = screen(load_model(model), [waters(400)], tmp_path / f"{name}.parquet", settings_, plan)
        assert summary.totals is not None
    eager, compiled = (rows_of(tmp_path / f"{name}.parquet") for name in ("eager", "compiled"))
    for one, other in zip(eager, compiled, strict=True):
        assert one["energy_task0"] == pytest.approx(other["energy_task0"], abs=2e-5)
        np.testing.assert_allclose(one["forces_task0"], other["forces_task0"], atol=1e-4)


@pytest.mark.compiler
def test_neighbours_found_in_batch_are_those_of_the_workers(model, tmp_path):
    """Neighbours agree for molecules, slabs, crystals with atoms outside of the cell, and more slots than estimated."""
    pytest.importorskip("nvalchemiops")
    far = rattled_crystal(2)
    far.positions += np.random.default_rng(0).integers(-3, 4, (len(far), 3)) @ far.cell[:]
    slab = bulk("Na", cubic=True)
    slab.pbc = (True, True, False)
    frames = [*(rattled_molecule("H2O", seed) for seed in range(80)), *[rattled_crystal(1), far, slab, bulk("Na")] * 5]
    structures = [to_structure(atoms, f"s#{n}") for n, atoms in enumerate(frames)]
    settings_ = ScreenSettings(tasks=("task0",), forces=("task0",))
    for name, on_device in (("device", True), ("host", False)):
        plan = ScreenPlan(workers=0, device_neighbours=on_device)
        screen(
            load_model(model), [FunctionSource("s", lambda: structures)], tmp_path / f"{name}.parquet", settings_, plan
        )
    for one, other in zip(rows_of(tmp_path / "device.parquet"), rows_of(tmp_path / "host.parquet"), strict=True):
        assert one["energy_task0"] == pytest.approx(other["energy_task0"], abs=1e-4)
        np.testing.assert_allclose(one["forces_task0"], other["forces_task0"], atol=1e-4)


def test_names_of_files_are_text_in_results(tmp_path):
    """A name that is not UTF-8, and one with a line break."""
    paths = [Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.extxyz")), tmp_path / "a\nb.extxyz"]
    for path in paths:
        write_extxyz(tmp_path / "plain.extxyz", molecules(1)).rename(path)
    names = [source.name for source in sources_of(paths)]
    assert names == ["\\udcff.extxyz", "a\\nb.extxyz"]
