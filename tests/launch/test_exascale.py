"""launch/runs/exascale.toml with miniatures of its sixteen tasks: dry-run, and launched on every site."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from click.testing import CliRunner
from launched import launch
from sources import make_shards, metals, molecules

from hydrazero.launch.cli.main import main
from hydrazero.launch.job.site_file import site_names
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.targets import TargetSection
from hydrazero.trainer.config.run_file import load_run_config

EXASCALE = Path(__file__).parents[2] / "launch" / "runs" / "exascale.toml"
NODES = {"frontier": 2048, "aurora": 1024, "perlmutter": 1536, "slurm": 64, "local": 1}
MOLECULES = ("ani1x", "nabla2dft", "omol25", "opoly26", "qcml", "qm7x", "transition1x")
SMALL = ("model.features=16", "model.head_features=16", "data.workers=0")
BATCH = ("batch.structures=8", "batch.atoms=128", "batch.slots=8192", "batch.edges=8192")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with shards of all tasks, where the run file looks for them."""
    root = tmp_path_factory.mktemp("exascale")
    for number, task in enumerate(load_run_config(EXASCALE).tasks):
        frames = molecules(10, number) if task.name.startswith(MOLECULES) else metals(10, number)
        settings = {}
        if task.name == "omol25-charged":
            for atoms in frames:
                atoms.info.update(charge=1, multiplicity=2)
        if task.name == "mptrj":
            add_magnetic_moments(frames)
            settings = {"targets": {"magmom": TargetSection(field="magmom", of="atom", unit="muB")}}
        make_shards(root / "shards", task.name, frames, **settings)
    return root


def add_magnetic_moments(frames: list[Atoms]) -> None:
    for atoms in frames:
        atoms.set_array("magmom", np.linspace(0.0, 2.0, len(atoms)))


def test_it_starts(folder, monkeypatch):
    """All sixteen tasks in a dry run, in small batches; the file says everything else."""
    monkeypatch.chdir(folder)
    words = [word for change in (*SMALL, *BATCH) for word in ("--set", change)]
    result = CliRunner().invoke(main, ["train", str(EXASCALE), "--dry-run", *words])
    assert result.exit_code == 0, result.output
    assert "dry run: the run can start; nothing was written." in result.output
    for task in load_run_config(EXASCALE).tasks:
        assert task.name in result.output
    assert "magmom" in read_manifest(folder / "shards" / "mptrj").targets
    assert "magmom" not in result.output  # the run file leaves it out
    assert not (folder / "runs" / "exascale").exists()


@pytest.mark.parametrize("site", site_names())
def test_it_is_launched_on_every_site(site, folder, monkeypatch):
    monkeypatch.chdir(folder)
    out = f"run.out=runs/{site}"
    result = launch(EXASCALE, "--site", site, "--nodes", NODES[site], "--account", "a", "--set", out)
    assert result.exit_code == 0 and result.output == f"runs/{site}/launch/job.sh\n", result.output
    done = subprocess.run(["bash", "-n", result.output.strip()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = Path(result.output.strip()).read_text()
    assert text.count(" --task ") == (16 if site == "frontier" else 0)
