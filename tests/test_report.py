"""The report, from the files of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from structures import facts

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.evaluation_errors import schema_of
from hydrazero.trainer.report import parity_picture, write_report
from hydrazero.trainer.report_data import read_predictions
from hydrazero.trainer.run_files import read_metrics, truncate_metrics


def made_run(folder: Path, *, evaluated: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    record = {
        "run": {"out": str(folder)},
        "model": {"encoder": "painn", "features": 8, "layers": 2, "cutoff": 5.0},
        "train": {"steps": 20},
        "tasks": [{"name": "a<b>"}, {"name": "plain"}],
        "versions": {"torch": "2"},
        "command": "hydrazero train <x>",
        "started": "2026-01-01T00:00:00+00:00",
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines = []
    for step in range(1, 21):
        task = {"energy_loss": 1 / step, "forces_loss": None if step % 2 else 1 / step, "structures": 3}
        rates = {"structures_per_s": 10.0, "atoms_per_s": 99.0, "data_wait_share": 0.1, "skipped_structures": 1207}
        lines.append({"kind": "train", "step": step, "loss": 1.0, "tasks": {"a<b>": task, "plain": task}, **rates})
    error = {"energy_mae_mev_per_atom": 3.0, "force_mae_mev_per_angstrom": None, "structures": 4}
    lines.append({"kind": "evaluation", "split": "val", "step": 20, "tasks": {"plain": error}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        row = {
            "structures": 5,
            "energy_mae_mev_per_atom": 1.5,
            "trivial_energy_mae_mev_per_atom": 30.0,
            "stress_mae_mev_per_angstrom3": None,
            "trivial_stress_mae_mev_per_angstrom3": None,
            "energy_spread": None,
            "targets": {},
            "fidelity": "<PBE>",
        }
        forces = {"force_mae_mev_per_angstrom": 40.0, "trivial_force_mae_mev_per_angstrom": 800.0}
        none = dict.fromkeys(forces)
        document = {"split": "test", "tasks": {"a<b>": {**row, **forces}, "plain": {**row, **none}}}
        (folder / "evaluation.json").write_text(json.dumps(document))
        (folder / "predictions").mkdir(exist_ok=True)
        for name in document["tasks"]:
            write_predictions(folder / "predictions" / f"{name}.parquet", forces=name == "a<b>")
    return folder


def write_predictions(path: Path, *, forces: bool) -> None:
    rows = []
    for number in range(5):
        labels = np.arange(6.0) + number if forces else None
        rows.append(
            {
                "source_id": f"x#{number}",
                "numbers": [8, 1],
                "energy": -100.0 - number,
                "energy_predicted": -100.1 - number,
                "reference_energy": -90.0,
                "forces": labels,
                "forces_predicted": None if labels is None else labels + np.array([1, 1, 1, 3, 3, 3]),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema_of(facts("x"))), path)


def test_report_holds_everything_and_nothing_from_outside(tmp_path):
    page = write_report(made_run(tmp_path / "run")).read_text()
    assert page.count("<img") == 4 and page.count("data:image/png;base64,") == 4
    assert "a&lt;b&gt;" in page and "a<b>" not in page and "&lt;PBE&gt;" in page
    assert "20.0" in page  # 30 over 1.5 meV/atom
    assert "http" not in page.replace("http-equiv", "")


def test_a_run_not_evaluated_says_how(tmp_path):
    page = write_report(made_run(tmp_path / "run", evaluated=False)).read_text()
    assert "hydrazero evaluate" in page and page.count("<img") == 2


def test_errors_by_element_and_residuals(tmp_path):
    made_run(tmp_path / "run")
    data = read_predictions(tmp_path / "run" / "predictions" / "a<b>.parquet")
    assert data.force_error_by_element == pytest.approx({"H": 3000.0, "O": 1000.0})
    np.testing.assert_allclose(data.energy, [-5.0, -5.5, -6.0, -6.5, -7.0])
    np.testing.assert_allclose(data.energy_predicted - data.energy, -0.05)


def test_parity_picture(tmp_path):
    parity_picture(made_run(tmp_path / "run"), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_files_are_named(tmp_path):
    run = made_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"kind": "tra')
    assert len(read_metrics(run)) == 21  # a last line cut short is a run still alive
    metrics.write_text('{"kind\n' + whole)
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 1"):
        write_report(run)
    metrics.write_text(whole)
    (run / "predictions" / "plain.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"plain.parquet"):
        write_report(run)


def test_truncate_leaves_what_came_before(tmp_path):
    run = made_run(tmp_path / "run")
    truncate_metrics(run, 7)
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 8))


def test_skipped_structures_are_told(tmp_path):
    assert "1,207 training structures were skipped" in write_report(made_run(tmp_path)).read_text()
