"""Tables of results: plans that come of other runs, and errors over the best."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from results import finetuning, jobs, sixteen_page, tables
from results.jobs import all_jobs, plan

from hydrazero.shards.files import toml_text, write_json
from hydrazero.trainer.config.run_file import load_run_config

SPEC: dict[str, Any] = {
    "title": "Two methods",
    "text": "On two tasks.",
    "ranks": 2,
    "data": [{"name": "a", "shards": "a"}, {"name": "b", "shards": "b"}],
    "runs": [
        {"name": "plain1", "method": "plain", "together": True, "structures": 16},
        {"name": "plain2", "method": "plain", "together": True, "steps_of": "plain1"},
        {"name": "other1", "method": "other", "together": True, "steps_of": "plain1"},
        {"name": "alone", "structures": 4, "structures_of": "plain1"},
    ],
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of all joint runs; task b has no forces."""
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", tmp_path)
    (tmp_path / "two").mkdir()
    for name, energy in (("plain1", 1.0), ("plain2", 4.0), ("other1", 3.0), ("a-alone", 0.5)):
        a = {"energy_mae_mev_per_atom": energy, "force_mae_mev_per_angstrom": 10.0 * energy}
        b = {"energy_mae_mev_per_atom": 6.0, "force_mae_mev_per_angstrom": None}
        document = {"tasks": {"a": a} if "alone" in name else {"a": a, "b": b}, "structures": {"a": 804, "b": 80}}
        write_json(tmp_path / "two" / f"{name}.result.json", document)
    write_json(tmp_path / "two" / "plain1.plan.json", {"steps": 55, "seconds": 900.0})
    return tmp_path


def test_plans_follow_other_runs(results, monkeypatch):
    by_label = {job.label: job for job in all_jobs(SPEC, "two")}
    assert list(by_label) == ["plain1", "plain2", "other1", "a-alone", "b-alone"]
    assert plan(by_label["other1"], []) == {"steps": 55, "seconds": 900.0}
    # 804 structures, 8 in a step
    monkeypatch.setattr(jobs, "structures_per_step", lambda *of: 8.0)
    assert plan(by_label["a-alone"], []) == {"steps": 100}
    assert plan(by_label["b-alone"], []) == {"steps": 10}


def test_errors_stand_over_the_best_joint_run(results):
    page = tables.write_table(SPEC, "two", all_jobs(SPEC, "two")).read_text().splitlines()
    energies = page[page.index("## Energies") :]
    assert "| task | best, meV/atom | plain | other | alone |" in energies
    assert "| `a` | 1 | 2.00 | 3.00 | 0.50 |" in energies  # plain: the geometric mean of 1 and 4
    assert "| `b` | 6 | 1.00 | 1.00 |  |" in energies
    forces = page[page.index("## Forces") :]
    assert "| `a` | 10 | 2.00 | 3.00 | 0.50 |" in forces and not any("`b`" in line for line in forces)
    assert "| `plain` | 2 | 2.00 | 1.41 | 2.00 | 2.00 | 1.587 |" in page
    assert "| `other` | 1 | 3.00 | 1.73 | 3.00 | 3.00 | 2.080 |" in page


def test_a_table_of_nothing_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", tmp_path)
    assert "Nothing has been run yet." in tables.write_table(SPEC, "two", all_jobs(SPEC, "two")).read_text()


def test_the_page_of_a_run_has_a_line_for_each_task(results, monkeypatch):
    run = results / "run"
    run.mkdir()
    model = {"encoder": "painn", "features": 64, "layers": 3}
    write_json(run / "run.json", {"ranks": 2, "model": model, "balance": {"method": "famo"}})
    rows = [{"kind": "train", "step": step, "steps_per_s": rate} for step, rate in ((10, 1.0), (130, 0.25))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: dict[str, Any] = {"fidelity": "PBE", "structures": 1200}
    for key in tables.ERRORS.values():
        task |= {key: 1.234, f"trivial_{key}": None}
    write_json(run / "evaluation.json", {"tasks": {"a": task}})
    monkeypatch.setattr(sixteen_page, "ROOT", results)
    (results / "two").rename(results / "balancing")
    found = sixteen_page.numbers(run)
    assert (found["steps"], found["minutes"], found["method"]) == (130, pytest.approx(490 / 60), "famo")
    assert "| `a` | PBE | 1,200 | 1.23 |  | 0.500 | 1.23 |  | 5.00 |" in sixteen_page.errors(run)


def test_learning_curves(results, monkeypatch):
    """Each task as many structures as there are, once; a page and a picture of what is done."""
    monkeypatch.setattr(finetuning, "ROOT", results)
    monkeypatch.setattr(finetuning, "PAGES", results)
    there = {"a": 300, "b": 12}
    monkeypatch.setattr(
        finetuning, "read_manifest", lambda folder: SimpleNamespace(structures=lambda split: there[str(folder)])
    )
    held_out = [{"name": name, "shards": name, "held_out": True, "text": f"Task {name}"} for name in there]
    known = {"name": "known", "shards": "known"}
    spec = {**SPEC, "findings": "It helps.", "sizes": [10, 30, 100], "data": [known, *held_out]}
    points = finetuning.points_of(spec, "two")
    assert [(point.task, point.size) for point in points] == [("a", 10), ("b", 10), ("a", 30), ("b", 12), ("a", 100)]
    page = finetuning.write_page(spec, "two", points).read_text()
    assert page.count("Nothing has been run yet.") == 2 and not (results / "two.png").exists()
    for point in points[:3]:
        errors = {way: dict.fromkeys(tables.ERRORS.values(), 100.0 / point.size) for way in finetuning.WAYS}
        errors["finetuned"]["trivial_force_mae_mev_per_angstrom"] = 7.0
        write_json(point.path, {**errors, "head": "known", "seconds": {"finetuned": 61.0, "scratch": 122.0}})
    page = finetuning.write_page(spec, "two", points).read_text()
    assert (results / "two.png").stat().st_size > 10_000
    assert "| 30 | `known` | 3.33 | 3.33 | 3.33 | 3.33 | 3.33 | 3.33 | 61 | 122 |" in page
    assert "| 10 | `known` | 10.0 |" in page and "| 12 |" not in page
    assert "It helps." in page and "Task a. Predicting zero forces gives an error of 7.0 meV/Å." in page


def test_from_scratch_starts_from_nothing(tmp_path):
    planned = {
        "run": {"out": "a", "start_from": "model"},
        "tasks": [{"name": "t", "shards": "s", "init_head": "old"}],
        "finetune": {"method": "full"},
        "train": {"steps": 300, "evaluate_every": 15},
        "deepspeed": {"config": "zero1", "optimizer": {"params": {"lr": 5e-4}}},
    }
    spec = {"scratch_rate": 2e-3, "scratch_steps": 2.0}
    (tmp_path / "run.toml").write_text(toml_text(finetuning.from_scratch(planned, tmp_path / "b", spec)))
    config = load_run_config(tmp_path / "run.toml")
    assert (config.run.start_from, config.tasks[0].init_head, config.finetune.method) == ("", "", "full")
    assert (config.train.steps, config.train.evaluate_every) == (600, 30)
    assert config.deepspeed["optimizer"]["params"]["lr"] == 2e-3
