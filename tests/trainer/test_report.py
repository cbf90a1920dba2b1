"""The report, from the files of one run and of several."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from structures import facts

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.evaluation.errors import schema_of
from hydrazero.trainer.plots.parity import cloud, parity_plots
from hydrazero.trainer.records.run_files import read_metrics, truncate_metrics
from hydrazero.trainer.records.task_errors import Evaluation, TaskErrors
from hydrazero.trainer.report import parity_picture, write_report
from hydrazero.trainer.report.errors_by import error_bins
from hydrazero.trainer.report.history import cosines
from hydrazero.trainer.report.run_data import Parity, read_predictions, read_run, run_labels

TASKS = ("a<b>", "plain")


def made_run(folder: Path, *, evaluated: bool = True, steps: int = 20, error: float = 1.5, rate: float = 0.1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "run": {"out": str(folder)},
        "model": {"encoder": "painn", "features": 8, "layers": 2, "cutoff": 5.0},
        "train": {"steps": 20},
        "deepspeed": {"optimizer": {"params": {"lr": rate}}},
        "tasks": [{"name": name, "weight": 1.0, "shards": f"shards/{name}"} for name in TASKS],
        "versions": {"torch": "2"},
        "manifests": {"plain": "f" * 64},
        "git": {"commit": "c0ffee", "changed": True},
        "command": "hydrazero train <x>",
        "started": "2026-01-01T00:00:00+00:00",
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made_metrics(steps)))
    if evaluated:
        made_evaluation(folder, error)
    return folder


def made_metrics(steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        task = {
            "energy_mae_mev_per_atom": 9 / step,
            "force_mae_mev_per_angstrom": None if step % 2 else 1 / step,
            "structures": 3,
        }
        rates = {"structures_per_s": 10.0, "atoms_per_s": 99.0, "data_wait_share": 0.1, "skipped_structures": 1207}
        rates |= {"memory_mb": 512.0, "learning_rate": 0.1, "gradient_norm": None, "skipped_steps": 0}
        weights = {"a<b>": 1.0 + 0.01 * step, "plain": 1.0 - 0.01 * step}
        shares = {"a<b>": 0.25, "plain": 0.75}
        row = {"kind": "train", "step": step, "loss": 1 / step, "weights": weights, "sampling_shares": shares}
        lines.append({**row, "tasks": dict.fromkeys(TASKS, task), **rates})
        if step % 5 == 0:
            cosine = [[1.0, 0.04 * step], [0.04 * step, 1.0]] if step > 5 else [[1.0, None], [None, None]]
            norms = {"a<b>": 2.0, "plain": 3.0 if step > 5 else None}
            balance = {"kind": "balance", "step": step, "gradient_norms": norms, "cosines": cosine}
            lines.append({**balance, "weights": weights})
    if steps >= 20:
        error = {"energy_mae_mev_per_atom": 3.0, "force_mae_mev_per_angstrom": None, "structures": 4}
        lines.append({"kind": "evaluation", "split": "val", "step": 20, "loss": 0.2, "tasks": {"plain": error}})
    return lines


def made_evaluation(folder: Path, error: float) -> None:
    row = {
        "structures": 5,
        "energy_mae_mev_per_atom": error,
        "trivial_energy_mae_mev_per_atom": 30.0,
        "stress_mae_mev_per_angstrom3": None,
        "trivial_stress_mae_mev_per_angstrom3": None,
        "energy_spread": None,
        "targets": {},
        "fidelity": "<PBE>",
    }
    forces = {"force_mae_mev_per_angstrom": 40.0, "trivial_force_mae_mev_per_angstrom": 800.0}
    document = {"split": "test", "tasks": {"a<b>": {**row, **forces}, "plain": {**row, **dict.fromkeys(forces)}}}
    (folder / "evaluation.json").write_text(json.dumps(document))
    (folder / "predictions").mkdir(exist_ok=True)
    for name in TASKS:
        write_predictions(folder / "predictions" / f"{name}.parquet", forces=name == "a<b>")


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
    rows.append({"source_id": "y", "numbers": [8], "energy_predicted": -50.0, "reference_energy": -45.0})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema_of(facts("x"))), path)


def alternatives(page: str) -> list[str]:
    return re.findall(r'<img alt="([^"]*)"', page)


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the table after a heading, with a star before those that stand out."""
    table = page.split(heading)[1].split("</table>")[0]
    rows = [re.findall(r'<td(?: class="([^"]*)")?>(.*?)</td>', row) for row in table.split("<tr>")]
    return [["*" * ("best" in kind) + unescape(text) for kind, text in row] for row in rows if row]


def test_report_holds_everything_and_nothing_from_outside(tmp_path):
    page = write_report([made_run(tmp_path / "run")]).read_text()
    shown = (
        "predicted against true energies",
        "number of atoms",
        "by task and element",
        "length of the force",
        "learning rate",
        "errors of each task",
        "waiting for data, memory",
        "loss weights",
        "structures drawn",
        "gradient norms",
        "cosines",
    )
    assert [sum(text in one for one in alternatives(page)) for text in shown] == [1] * len(shown)
    assert page.count("data:image/png;base64,") == len(shown)
    assert "a&lt;b&gt;" in page and "a<b>" not in page and "&lt;PBE&gt;" in page
    assert "20.0" in page  # 30 over 1.5 meV/atom
    assert "c0ffee with uncommitted changes" in page and "f" * 64 in page and "not recorded" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "1,207 training structures were skipped" in page
    assert rows_of(page, "Balance of the tasks")[0] == ["a<b>", "1.2", "25.0", "2"]


def test_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [made_run(tmp_path / "x" / "run"), made_run(tmp_path / "y" / "run", error=1.25, rate=0.2)]
    page = write_report(runs).read_text()
    assert (tmp_path / "comparison.html").read_text() == page
    assert rows_of(page, "Energy MAE") == [["a<b>", "1.50", "*1.25"], ["plain", "1.50", "*1.25"]]
    assert rows_of(page, "Force MAE") == [["a<b>", "40.0", "40.0"]]
    assert rows_of(page, "Differences between the configurations") == [["deepspeed.optimizer.params.lr", "0.1", "0.2"]]
    assert page.count("<summary>x/run</summary>") == page.count("<summary>y/run</summary>") == 1
    assert sum("learning rate" in one for one in alternatives(page)) == 1
    assert "http" not in page


def test_runs_that_were_not_evaluated_are_compared_by_their_validation(tmp_path):
    runs = [made_run(tmp_path / "x"), made_run(tmp_path / "y", evaluated=False), made_run(tmp_path / "z", steps=3)]
    page = write_report(runs, tmp_path / "all.html").read_text()
    assert "y has not been evaluated" in page and "the last validation of each run" in page
    assert rows_of(page, "the last validation")[0] == ["plain", "3.00", "3.00"]
    assert "3 of 20 steps (in progress, or stopped)" in page


def test_runs_are_told_apart(tmp_path):
    assert run_labels([Path("a/b/run"), Path("a/c/run")]) == ["b/run", "c/run"]
    assert run_labels([Path("a/b"), Path("a/c")]) == ["b", "c"]
    with pytest.raises(ConfigError, match="named twice"):
        run_labels([Path("a/b"), Path("a/../a/b")])


def test_a_run_in_progress_says_what_is_not_there(tmp_path):
    page = write_report([made_run(tmp_path / "run", evaluated=False, steps=3)]).read_text()
    assert "hydrazero evaluate" in page and "3 of 20 steps (in progress, or stopped)" in page
    assert "No evaluation on the validation split has been logged yet" in page
    assert "No gradients were measured yet" in page
    page = write_report([made_run(tmp_path / "run", evaluated=False, steps=0)]).read_text()
    assert "No step has been logged yet" in page and not alternatives(page)


def test_errors_by_element_and_residuals(tmp_path):
    made_run(tmp_path / "run")
    data = read_predictions(tmp_path / "run" / "predictions" / "a<b>.parquet", {})
    assert data.force_error_by_element == pytest.approx({"H": 3000.0, "O": 1000.0})
    np.testing.assert_allclose(data.energy, [-5.0, -5.5, -6.0, -6.5, -7.0, np.nan])
    np.testing.assert_allclose((data.energy_predicted - data.energy)[:5], -0.05)
    assert data.atoms.tolist() == [2, 2, 2, 2, 2, 1] and data.force_atoms.tolist() == [2] * 10
    assert data.force_numbers.tolist() == [8, 1] * 5


def test_errors_in_bins():
    generator = np.random.default_rng(0)
    few = error_bins(np.array([3.0, 5, 3, 5, 3]), np.array([1.0, 10, 2, 20, 3]))
    assert few.at.tolist() == [3, 5] and few.median.tolist() == [2, 15]
    at = generator.permutation(1000).astype(float)
    many = error_bins(at, 2 * at)
    np.testing.assert_allclose(many.median, 2 * many.at)  # each error is in the bin of its own value
    assert len(many.at) == 12 and (np.diff(many.at) > 0).all()
    assert (many.low < many.median).all() and (many.median < many.high).all()
    assert error_bins(np.array([np.nan]), np.array([1.0])) is None


def test_density_counts_every_point():
    true = np.random.default_rng(0).normal(size=5000)
    one = cloud(Figure().add_subplot(), np.append(true, np.nan), np.append(true + 0.1, 0.0), "x", "meV")
    assert one.counts.sum() == 5000 and "MAE 100 meV" in one.error and "n = 5,000" in one.error


def test_predictions_that_are_not_finite_are_said_to_be_so():
    labels, lost = np.zeros(3), np.full(3, np.nan)
    parity = Parity(energy=labels, energy_predicted=lost, forces=lost, forces_predicted=lost)
    said = [text.get_text() for ax in parity_plots({"a": parity}).axes for text in ax.texts]
    assert said == ["energies are not finite", "no forces"]


def test_mean_cosines_leave_out_what_was_not_measured(tmp_path):
    (_, last), (title, mean) = cosines(read_run(made_run(tmp_path / "run"), "run"))
    assert title == "mean of 4 measurements"
    np.testing.assert_allclose(last, [[1.0, 0.8], [0.8, 1.0]])
    np.testing.assert_allclose(mean, [[1.0, 0.6], [0.6, 1.0]])


def test_parity_picture(tmp_path):
    parity_picture(made_run(tmp_path / "run"), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_files_are_named(tmp_path):
    run = made_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"kind": "tra')
    assert len(read_metrics(run)) == 25  # a last line cut short is a run still alive
    metrics.write_text('{"kind\n' + whole)
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 1"):
        write_report([run])
    metrics.write_text(whole)
    (run / "predictions" / "plain.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"plain.parquet"):
        write_report([run])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", [1.0]),
        ("loss", -1e300),
        ("loss", 10**400),
        ("memory_mb", {}),
        ("skipped_steps", []),
        ("weights", {"plain": [1]}),
        ("cosines", 5),
        ("cosines", [[1.0, 2.0], [3.0]]),
        ("cosines", [[1.0] * 3] * 3),
    ],
)
def test_metrics_that_are_no_numbers_are_named(tmp_path, key, value):
    path = made_run(tmp_path) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, key: value}) + "\n" for row in rows))
    # What is no number at all is named by its line, and what is none of this metric's by its step.
    with pytest.raises(ConfigError, match=rf"metrics.jsonl(: {key}[.\w]* of step \d+ \(\w+\) |, line 1, .*\({key})"):
        run = read_run(tmp_path, "run")
        cosines(run) if key == "cosines" else run.series("train", key, *(["plain"] if key == "weights" else []))


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"balance": 5}, "balance"),
        ({"data": {"temperature": "x"}}, "data.temperature"),
        ({"loss": []}, "loss"),
        ({"model": {}}, "model.encoder"),
        ({"resumes": [{"step": 1, "steps": 5, "changes": [1]}]}, "resumes.0.changes.0"),
        ({"resumes": [{"step": 1, "steps": 5, "changes": [{"key": "a", "old": 1, "new": 2, "x": 3}]}]}, "changes.0.x"),
        ({"resumes": [{"step": 10**400, "steps": 5}]}, "resumes.0.step"),
    ],
)
def test_records_of_another_form_are_named(tmp_path, changed, place):
    path = made_run(tmp_path) / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ConfigError, match=rf"run.json has other content than it should have \([\w.]*{place}: "):
        write_report([tmp_path])


def test_resumes_without_a_date_are_shown(tmp_path):
    path = made_run(tmp_path) / "run.json"
    change = {"key": "train.steps", "old": 5, "new": 20}
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "resumes": [{"step": 4, "steps": 20, "changes": [change]}]})
    )
    page = write_report([tmp_path]).read_text()
    assert "resumed from step 4 on an unknown date" in page and "Settings changed at step 4: train.steps 5" in page


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("energy", None, "it lacks the column"),
        ("energy", "x", "Failed to parse string"),
        ("numbers", "x", "has no kernel"),
        ("forces", [[1.0]], "sequence"),
    ],
)
def test_predictions_of_another_form_are_named(tmp_path, column, value, said):
    path = made_run(tmp_path) / "predictions" / "plain.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(column)
    rest = table.remove_column(place)
    pq.write_table(rest if value is None else rest.add_column(place, column, pa.array([value] * len(table))), path)
    with pytest.raises(ConfigError, match=rf"plain.parquet cannot be read \(.*{said}.*run 'hydrazero evaluate' again"):
        write_report([tmp_path])


def test_files_larger_than_memory_are_not_read(tmp_path):
    path = made_run(tmp_path) / "metrics.jsonl"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"metrics.jsonl has 1,099,511,627,776 bytes, more than the 1,073,741,824"):
        write_report([tmp_path])


def test_truncate_leaves_what_came_before(tmp_path):
    run = made_run(tmp_path / "run")
    truncate_metrics(run, 7)
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "train"] == list(range(1, 8))


def test_errors_keep_their_names_and_order_in_json():
    row = {
        "structures": 3,
        "energy_mae_mev_per_atom": 1.5,
        "force_mae_mev_per_angstrom": None,
        "stress_mae_mev_per_angstrom3": None,
        "energy_spread_mev_per_atom": 0.5,
        "target_mae": {"gap": 0.1, "dipole": None},
        "energy_loss": 2.0,
        "forces_loss": None,
    }
    errors = TaskErrors.from_json(row)
    assert json.dumps(errors.to_json()) == json.dumps(row)
    assert json.dumps(TaskErrors.from_json({**row, "unseen": 0}).to_json()) == json.dumps({**row, "unseen": 0})
    assert errors.scalars() == {
        **{key: value for key, value in row.items() if key not in ("structures", "target_mae")},
        "gap_mae": 0.1,
        "dipole_mae": None,
    }


def test_evaluations_of_older_versions_are_read():
    spread = {"count": 2, "mean_mev_per_atom": 1.0, "most_mev_per_atom": 2.0, "error_over_spread": 1.1}
    spread |= {"within_one": 0.5, "within_two": 1.0}
    target = {"unit": "eV", "count": 2, "mae": 0.1, "trivial_mae": 0.3}
    task = {"structures": 2, "energy_mae_mev_per_atom": 1.0, "energy_spread": spread, "targets": {"gap": target}}
    evaluation = Evaluation.from_json({"split": "test", "tasks": {"a": task}})
    found = evaluation.tasks["a"]
    assert (evaluation.weights, found.energy_mae, found.stress_mae, found.fidelity) == (None, 1.0, None, None)
    assert found.energy_spread is not None and found.energy_spread.quantile_99 == 2.0
    assert found.to_json()["energy_spread"] == spread and found.to_json()["targets"] == {"gap": target}
