"""Runs of other tools in equal time, with a tool that predicts zero forces, and their tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from placed import make_split_shards
from results import equal_time, jobs, tables
from results.jobs import all_jobs
from results.peers import run as peers_run
from results.peers import tools
from results.peers.run import PeerRun
from results.peers.split_files import energies_by_element
from results.peers.tools import Job, Mace, Training, clock, time_of

from hydrazero.shards.files import write_json

PREDICT = """
import sys
import ase.io, numpy as np
structures = ase.io.read(sys.argv[2], ":")
energies = [atoms.get_potential_energy() + 0.1 * len(atoms) for atoms in structures]
forces = np.concatenate([np.zeros((len(atoms), 3)) for atoms in structures])
np.savez(sys.argv[3], energy=energies, forces=forces, structures_per_s=9.0, parameters=12, version="1.0")
"""


class FakeTool:
    """A tool that writes the number of its epochs, takes a second for each, and three to start."""

    package = "fake"
    probe = 2.0

    def prepare(self, job: Job) -> None:
        (job.folder / "prepared").touch()

    def limit(self, seconds: float, probe: Training) -> float:
        return (seconds - probe.start) / probe.per_epoch

    def line(self, job: Job, out: Path, limit: float) -> list[str]:
        assert (job.folder / "prepared").exists()
        return [job.script("python"), "-c", f"open('epochs', 'w').write('{limit}')"]

    def training(self, job: Job, out: Path, limit: float, started: float, ended: float) -> Training:
        epochs = float((out / "epochs").read_text())
        return Training(start=3.0, seconds=3.0 + epochs, epochs=epochs, model=out / "epochs")


def frames(*lengths: float) -> list[Atoms]:
    """Return molecules of hydrogen with bonds in Å, an energy of -3 eV an atom and forces of 0.2 eV/Å."""
    made = []
    for length in lengths:
        atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, length]])
        atoms.info["energy"] = -6.0
        atoms.arrays["forces"] = np.array([[0, 0, 0.2], [0, 0, -0.2]])
        made.append(atoms)
    return made


def hydrogen(folder: Path) -> Path:
    """Return shards of six, two and four molecules."""
    splits = {"train": frames(0.7, 0.71, 0.72, 0.73, 0.74, 0.75), "val": frames(0.76, 0.77)}
    return make_split_shards(folder / "shards", "h2", **splits, test=frames(0.78, 0.79, 0.8, 0.81))


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of the fake tool, whose Python is that of the tests."""
    folder = tmp_path / "bench" / "fake"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / ".installed").touch()
    (tmp_path / "predict_fake.py").write_text(PREDICT)
    monkeypatch.setattr(peers_run, "PEERS", tmp_path)
    monkeypatch.setitem(tools.TOOLS, "fake", FakeTool())
    return folder.parent


def peer_run(tmp_path: Path, environments: Path, **changes: Any) -> PeerRun:
    values = {
        "peer": {"name": "fake", "tool": "fake", "settings": "fake.yaml"},
        "dataset": {"name": "h2", "groups": [{"name": "first", "file": "h2.extxyz", "frames": [8, 11]}]},
        "seconds": 10.0,
        "threads": 2,
        "seed": 1,
        "environments": environments,
        "work": tmp_path / "work",
    }
    return PeerRun(**{**values, **changes})


def test_a_peer_is_trained_for_the_time_and_measured(tmp_path, environments):
    shards = hydrogen(tmp_path)
    found = peer_run(tmp_path, environments).result(shards)
    assert found["seconds"] == 10.0 and found["epochs"] == 7.0 and found["structures_per_s"] == 6.0
    assert (found["parameters"], found["predicted_per_s"], found["version"]) == (12, 9.0, "1.0")
    for errors in (found["test"], found["groups"]["first"]):
        assert errors["structures"] == 4
        assert errors["energy_mae_mev_per_atom"] == pytest.approx(100.0)
        assert errors["energy_rmse_mev_per_atom"] == pytest.approx(100.0)
        assert errors["force_mae_mev_per_angstrom"] == pytest.approx(200.0 / 3.0)
        assert errors["force_rmse_mev_per_angstrom"] == pytest.approx(200.0 / 3.0**0.5)
    assert found["val"]["structures"] == 2
    assert "epochs" in (tmp_path / "work" / "run" / "command.txt").read_text()


def test_faults_are_said(tmp_path, environments):
    shards = hydrogen(tmp_path)
    with pytest.raises(SystemExit, match="takes 3 s to start"):
        peer_run(tmp_path, environments, seconds=2.0).result(shards)
    with pytest.raises(SystemExit, match=r"h2\.extxyz#1\d is in none of the groups"):
        groups = [{"name": "few", "file": "h2.extxyz", "frames": [8, 9]}]
        peer_run(tmp_path, environments, dataset={"name": "h2", "groups": groups}).result(shards)
    (environments / "fake" / ".installed").unlink()
    with pytest.raises(SystemExit, match=r"make \.bench/fake/\.installed"):
        peer_run(tmp_path, environments).result(shards)


def test_times_and_limits(tmp_path):
    log = "2026-01-31 23:59:58.500 INFO: Started training, reporting\n2026-02-01 00:00:01.250 INFO: Training complete\n"
    assert time_of("Training complete", log) - time_of("Started training", log) == pytest.approx(2.75)
    assert clock(93_784.4) == "01:02:03:04"
    probe = Training(start=10.0, seconds=30.0, epochs=2.0, model=tmp_path)
    assert Mace().limit(600.0, probe) == 59.0 and Mace().limit(12.0, probe) == 2.0


def test_energies_of_elements_fit(tmp_path):
    peers_run.write_split_files(hydrogen(tmp_path), tmp_path)
    written = ase.io.read(tmp_path / "train.xyz", ":")
    assert len(written) == 6 and not written[0].cell.any()
    assert written[0].get_potential_energy() == -6.0 and np.abs(written[0].get_forces()).max() == pytest.approx(0.2)
    assert energies_by_element(written) == pytest.approx({"H": -3.0})


def test_peers_stand_beside_encoders(tmp_path, monkeypatch):
    for module in (jobs, equal_time):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", tmp_path)
    (tmp_path / "both").mkdir()
    spec = {
        "title": "Both",
        "text": "In equal time.",
        "ranks": 2,
        "seconds": 60,
        "data": [{"name": "h2", "text": "Hydrogen", "groups": [{"name": "300 K", "file": "a"}]}],
        "runs": [{"name": "painn"}, {"name": "mace"}],
        "peers": [{"name": "other", "tool": "mace", "settings": "mace.yaml"}],
    }
    keys = [key for mae, rmse, _ in equal_time.MEASURES.values() for key in (mae, rmse)]
    errors = dict(zip(keys, (1.0, 2.0, 30.0, 40.0), strict=True))
    found = {"val": errors, "test": errors, "groups": {"300 K": errors}, "parameters": 1234, "seconds": 59.6}
    found |= {"structures_per_s": 10.0, "predicted_per_s": 99.0}
    write_json(tmp_path / "both" / "h2-painn.result.json", found)
    write_json(tmp_path / "both" / "h2-other.result.json", {**found, "version": "0.3"})
    page = equal_time.write_equal_time(spec, "both", all_jobs(spec, "both")).read_text()
    costs = "1.00 / 2.00 | 30.0 / 40.0 | 1.00 / 2.00 | 30.0 / 40.0 | 1,234 | 10 | 99 | 60 |"
    assert f"| `painn` | {costs}" in page and f"| `other` 0.3 | {costs}" in page
    assert "| `mace` | not run yet |" in page
    assert "| run | 300 K: energy, meV/atom | 300 K: force, meV/Å |" in page
    assert "| `other` | 1.00 / 2.00 | 30.0 / 40.0 |" in page
