"""Files written by an earlier version still load, resume, evaluate and screen, and give the same numbers as then.

tests/data/older_files/README.md says how they were made.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from rank_processes import TESTS, TRAIN, finished_ranks

from hydrazero.launch.cli.main import main
from hydrazero.models import load_model
from hydrazero.models.inference.model_file import read_header
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.files import read_json
from hydrazero.shards.manifest import MANIFEST_NAME
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.records.run_files import read_metrics
from hydrazero.trainer.search.campaign import begin
from hydrazero.trainer.search.trial_rows import trial_rows

FILES = TESTS / "data" / "older_files"
PLACE = "FOLDER"
"""Placeholder in the files for the path of the folder that they were made in."""
CHANGED_NS = 1_700_000_000 * 10**9
"""Modification time of the sources of the unfinished conversion and screen, in nanoseconds since 1970."""
MODELS = {"painn": "zero1", "egnn": "zero3", "mace": "bf16", "lora": "lora"}
"""Exported model -> the run that it was exported from."""
DIGITS = 1e-4
"""Relative tolerance of logged numbers: the digits that a run prints; processors differ in those behind."""
BF16_DIGITS = 2e-3
"""The same for a run in bfloat16."""
TASKS = ("qm", "metals", "water")
SCREENED = ("sources/probes.extxyz", "shards/metals", "--generate", "screens/alloys.toml")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the files, make the copy the current folder, and return it."""
    root = tmp_path / "files"
    shutil.copytree(FILES, root)
    for name in ("sources/probes.extxyz", "sources/qm.extxyz"):
        os.utime(root / name, ns=(CHANGED_NS, CHANGED_NS))
    for name in ("screens/.unfinished.parquet.parts/_screen.json", "conversions/.qm.part/job.json"):
        (root / name).write_text((root / name).read_text().replace(PLACE, str(root.resolve())))
    monkeypatch.chdir(root)
    return root


def hydrazero(*words: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result


def same(now: Any, before: Any, rel: float, where: str = "") -> None:
    """Fail unless numbers agree and everything else is equal; keys that are new are ignored."""
    if isinstance(before, dict):
        for key, value in before.items():
            same(now[key], value, rel, f"{where}.{key}")
    elif isinstance(before, list):
        assert len(now) == len(before), where
        for number, (one, other) in enumerate(zip(now, before, strict=True)):
            same(one, other, rel, f"{where}[{number}]")
    elif isinstance(before, float):
        assert now == pytest.approx(before, rel=rel, abs=1e-9), where
    else:
        assert now == before, where


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("name", MODELS)
def test_models_predict_what_they_did(name):
    check_predictions(Path(f"models/{name}.safetensors"), name)
    hydrazero("inspect", f"models/{name}.safetensors")


def check_predictions(file: Path, name: str) -> None:
    potential, probes = load_model(file), ase.io.read("sources/probes.extxyz", ":")
    expected = read_json(Path("expected/predictions.json"))[name]
    assert expected
    for row in expected:
        (now,) = potential.predict([probes[row["structure"]]], tasks=[row["task"]])
        assert set(now["targets"]) == set(row["targets"])
        found = {**now, **{f"target {key}": value for key, value in now["targets"].items()}}
        wanted = {**row, **{f"target {key}": value for key, value in row["targets"].items()}}
        for key in wanted.keys() - {"structure", "task", "targets"}:
            if wanted[key] is None:
                assert found[key] is None, key
            else:  # sums in float32 whose terms cancel, and whose rounding depends on the processor
                what, largest = f"{row['task']} {key}", float(np.abs(wanted[key]).max())
                np.testing.assert_allclose(found[key], wanted[key], rtol=1e-6, atol=2e-6 + 1e-5 * largest, err_msg=what)


@pytest.mark.parametrize("task", TASKS)
def test_sources_become_the_same_shards(task):
    (source,) = [path for path in Path("sources").glob(f"{task}.*") if path.suffix != ".toml"]
    hydrazero("convert", source, "--config", f"sources/{task}.toml", "--task", task, "--out", f"again/{task}")
    same_files(Path("again") / task, Path("shards") / task)


def test_an_unfinished_conversion_is_finished():
    assert Path("conversions/.qm.part/notes/train-000000.pickle").is_file()
    hydrazero("convert", "sources/qm.extxyz", "--config", "sources/qm.toml", "--task", "qm", "--out", "conversions/qm")
    same_files(Path("conversions/qm"), Path("shards/qm"))
    assert not Path("conversions/.qm.part").exists()


def same_files(now: Path, before: Path) -> None:
    names = sorted(path.name for path in before.iterdir())
    assert sorted(path.name for path in now.iterdir()) == names
    for name in names:
        if name == MANIFEST_NAME:
            same_values(*(json.loads((folder / name).read_text()) for folder in (now, before)), where=name)
        else:
            assert (now / name).read_bytes() == (before / name).read_bytes(), name


def same_values(now: Any, before: Any, where: str) -> None:
    """Statistics and fitted references differ in their last digits from one processor's linear algebra to another's."""
    if isinstance(before, dict):
        assert before.keys() <= now.keys(), where  # manifests and facts have gained fields
        for key in before:
            same_values(now[key], before[key], f"{where}, {key}")
    elif isinstance(before, list):
        assert len(now) == len(before), where
        for place, (one, other) in enumerate(zip(now, before, strict=True)):
            same_values(one, other, f"{where}, {place}")
    elif isinstance(before, float):
        assert now == pytest.approx(before, rel=1e-9, abs=1e-12), where
    else:
        assert now == before, where


def test_shards_can_be_looked_at():
    shown = hydrazero("inspect", *(f"shards/{task}" for task in TASKS)).output
    assert "100 structures" in shown
    assert "polarizability" in hydrazero("inspect", "shards/qm").output


def test_settings_mean_what_they_did():
    """Files that set every key, most of them to another value than the default."""
    expected = read_json(Path("expected/settings.json"))
    found = {
        "runs/every_key.toml": load_run_config("runs/every_key.toml").model_dump(),
        "sources/every_key.toml": load_convert_settings(Path("sources/every_key.toml")).model_dump(),
        "search/space.toml": begin(Path("search/space.toml")).space.document(),
    }
    for name, settings in expected.items():
        same(json.loads(json.dumps(found[name])), settings, 0.0, name)


def test_a_run_records_its_settings_as_it_did():
    for run, file in (("zero1", "zero1.toml"), ("zero3", "zero3.toml"), ("lora", "lora/run.toml")):
        now = json.loads(json.dumps(load_run_config(f"runs/{file}").model_dump()))
        record = read_json(Path("runs") / run / "run.json")
        assert set(now) - set(record) == set()
        same(now, {key: value for key, value in record.items() if key in now and key != "deepspeed"}, 0.0, run)


@pytest.mark.ranks
@pytest.mark.parametrize("run", ["zero1", "zero3", "bf16"])
def test_killed_runs_of_two_ranks_resume(run):
    statuses, output = finished_ranks([TRAIN, f"runs/{run}.toml", "--resume"], 2)
    assert statuses == [0, 0], output
    check_resumed(run, run)


def test_a_killed_low_rank_run_resumes():
    hydrazero("train", "runs/lora/run.toml", "--resume")
    check_resumed("lora", "lora")


def test_a_killed_run_resumes_on_another_number_of_ranks_with_another_stage():
    changes = ("data.workers=2", "deepspeed.config=zero0", "deepspeed.gradient_accumulation_steps=2")
    hydrazero("train", "runs/zero1.toml", "--resume", *(f"--set={change}" for change in changes))
    check_resumed("zero1", "zero1_on_one_rank")


def check_resumed(run: str, name: str) -> None:
    """Compare everything logged after the checkpoint with what the earlier version logged when it resumed the run."""
    expected = read_lines(f"expected/{name}.jsonl")
    (resume,) = read_json(Path("runs") / run / "run.json")["resumes"]
    rows = read_metrics(Path("runs") / run)
    before = read_metrics(FILES / "runs" / run)
    step = resume["step"]
    assert [row for row in rows if row["step"] <= step] == [row for row in before if row["step"] <= step]
    digits = DIGITS
    if run == "bf16":
        digits = BF16_DIGITS
        for row in expected:  # differences of rounded numbers, which change by some 10% with how a graph is fused
            for key in ("gradient_norm", "gradient_norms", "cosines", "task_weights"):
                row.pop(key, None)
    same([row for row in rows if row["step"] > step], expected, digits, name)


@pytest.mark.parametrize("model", MODELS)
def test_runs_are_evaluated_and_exported_as_they_were(model):
    run = Path("runs") / MODELS[model]
    before = read_json(run / "evaluation.json")
    hydrazero("evaluate", run, "--out", "again")
    same(read_json(Path("again/evaluation.json"))["tasks"], before["tasks"], DIGITS, model)
    for file in (run / "predictions").glob("*.parquet"):
        same_table(Path("again/predictions") / file.name, file)
    options = ["--old-heads"] if model == "lora" else []
    hydrazero("export", run, "--out", "again/model.safetensors", *options)
    same_values(read_header(Path("again/model.safetensors")), read_header(Path(f"models/{model}.safetensors")), model)
    check_predictions(Path("again/model.safetensors"), model)


def test_a_run_is_reported():
    hydrazero("report", "runs/zero3")


def test_models_screen_as_they_did():
    sources = ("sources/probes.extxyz", "shards/qm", "shards/metals")
    hydrazero("screen", "models/painn.safetensors", *sources, "--out", "whole.parquet", "--forces-of", "metals,qm")
    same_table("whole.parquet", "screens/whole.parquet")
    by = ("--top", 10, "--by", "abs(energy_qm - energy_water) / atoms")
    sources = ("sources/probes.extxyz", "shards/water")
    hydrazero("screen", "models/mace.safetensors", *sources, "--out", "top.parquet", *by)
    same_table("top.parquet", "screens/top.parquet")


def test_an_unfinished_screen_is_finished():
    """Of its 1,236 structures the first 1,024 are done."""
    (part,) = Path("screens/.unfinished.parquet.parts").glob("part-*.parquet")
    options = ("--out", "screens/unfinished.parquet", "--tasks", "metals")
    shown = hydrazero("screen", "models/painn.safetensors", *SCREENED, *options).output
    assert re.search(r"^212\b.* in ", shown, flags=re.MULTILINE), shown
    same_table("screens/unfinished.parquet", "expected/finished.parquet")
    assert not part.exists()


def same_table(now: Path | str, before: Path | str) -> None:
    """Fail unless two parquet files hold the same rows; numbers agree within the rounding errors of float32.

    Columns that are new are ignored.
    """
    one, other = pq.read_table(now), pq.read_table(before)
    one = one.select([name for name in one.column_names if name in other.column_names])
    assert one.column_names == other.column_names and one.schema.types == other.schema.types
    for name in other.column_names:
        for a, b in zip(one[name].to_pylist(), other[name].to_pylist(), strict=True):
            if isinstance(b, float | list):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=name)
            else:
                assert (a is None) == (b is None) and (name == "reason" or a == b), name


def test_a_search_goes_on_and_is_reported():
    pytest.importorskip("optuna")
    rows = trial_rows(begin(Path("search/space.toml")))  # raises if the space, the run file or the data seem changed
    assert [(row.number, row.state, len(row.results)) for row in rows] == [
        (0, "finished", 2),
        (1, "finished", 2),
        (2, "pruned", 1),
    ]
    assert [row.values["model.encoder"] for row in rows] == ["painn", "schnet", "painn"]
    assert rows[1].error == pytest.approx(1.0589801235432275)
    hydrazero("search", "search/space.toml", "--report")
    assert Path("search/out/search.html").is_file()


def test_attempts_of_a_job_are_judged_as_they_were():
    verdict = Path("runs/zero1/launch/attempt-0001/verdict.json")
    before = read_json(verdict)
    shown = hydrazero("postmortem", "runs/zero1", status=75).output
    assert before["sentence"] in shown
    verdict.unlink()
    hydrazero("postmortem", "runs/zero1", status=75)
    now = read_json(verdict)
    assert (now["kind"], now["step"]) == (before["kind"], before["step"])
    assert "rank 1 on node1 was killed by SIGKILL" in now["sentence"]


def test_a_killed_run_is_launched_on_a_site_of_its_own_file():
    hydrazero("launch", "runs/zero1.toml", "--site", "sites/cluster.toml", "--nodes", 2, "--resume")
    assert "#SBATCH --nodes=2\n" in Path("runs/zero1/launch/job.sh").read_text()
