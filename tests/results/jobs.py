"""The runs behind a table of results: on one dataset or on all together, planned by a short run."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.own_errors import errors_and_costs

from hydrazero.shards.files import read_json, write_json
from hydrazero.trainer.records.run_files import read_metrics

HERE = Path(__file__).parent
PAGES = HERE.parents[1] / "docs" / "results"
"""Folder of the pages and their pictures."""
ROOT = Path("runs/results")


def command(*words: object) -> str:
    """Run a command of hydrazero and return what it prints; if it fails, stop with its output."""
    line = [str(Path(sys.executable).with_name("hydrazero")), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def train_rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows about training in a run's metrics."""
    return [row for row in read_metrics(out) if row["kind"] == "train"]


@dataclass(frozen=True, kw_only=True)
class ResultRun:
    """One run, on one dataset or on several together."""

    spec: dict[str, Any]
    """Contents of the TOML file of the table."""
    name: str
    """Name of the table."""
    datasets: tuple[dict[str, Any], ...]
    """Entries of the datasets in the TOML file."""
    run: dict[str, Any]
    """Entry of the run in the TOML file."""

    @property
    def label(self) -> str:
        """Return the name of the run's files."""
        run = str(self.run["name"])
        return run if self.run.get("together") else f"{self.datasets[0]['name']}-{run}"

    @property
    def folder(self) -> Path:
        """Return the folder of the run and of the short runs that plan it."""
        return ROOT / self.name / self.label

    def path(self, kind: str) -> Path:
        """Return the file of its 'plan' or 'result'."""
        return ROOT / self.name / f"{self.label}.{kind}.json"

    @property
    def structures(self) -> int:
        """Return the approximate number of structures in each rank's batch."""
        return int(self.run.get("structures", self.spec.get("structures", 4)))

    def shards(self, root: Path) -> list[Path]:
        """Return the shards of each dataset, which are converted from sources below `root` if they do not exist."""
        folders = []
        for data in self.datasets:
            folder = Path(data["shards"]) if "shards" in data else ROOT / self.name / "data" / str(data["name"])
            if not folder.exists():
                sources = [root / source for source in data["sources"]]
                command("convert", *sources, "--task", data["name"], "--out", folder, "--config", data["convert"])
            folders.append(folder)
        return folders

    def train(self, shards: list[Path], out: Path, steps: int) -> float:
        """Train the given number of steps and return the seconds that it took."""
        wanted = ("--structures", self.structures, "--temperature", self.spec.get("temperature", 1.0))
        batch = command("inspect", *shards, "--propose-batch", "--cutoff", 5.0, *wanted)
        names = [data["name"] for data in self.datasets]
        tasks = "\n".join(
            f'[[tasks]]\nname = "{name}"\nshards = "{folder}"\n' for name, folder in zip(names, shards, strict=True)
        )
        template = (HERE / f"{self.name}.run.toml").read_text(encoding="utf-8")
        values = {**self.run, "out": out, "steps": steps, "tasks": tasks, "batch": batch}
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        path = out.with_suffix(".toml")
        path.write_text(template.format(**values), encoding="utf-8")
        started = time.monotonic()
        command("train", path, "--ranks", self.spec["ranks"])
        return time.monotonic() - started


def all_jobs(spec: dict[str, Any], name: str) -> list[ResultRun]:
    """Return the runs of a table: one on all datasets for each entry with `together`, else one on each dataset."""
    jobs = []
    for run in spec["runs"]:
        parts = [tuple(spec["data"])] if run.get("together") else [(data,) for data in spec["data"]]
        jobs += [ResultRun(spec=spec, name=name, datasets=datasets, run=run) for datasets in parts]
    return jobs


def plan(job: ResultRun, shards: list[Path]) -> dict[str, Any]:
    """Return the number of steps of a run.

    It is that of another run (`steps_of`); or the number that draws as many structures of the dataset as a joint run
    (`structures_of`); or the number that a short run finds to take the table's seconds, during which the machine should
    do nothing else.
    """
    if "steps_of" in job.run:
        return read_json(ROOT / job.name / f"{job.run['steps_of']}.plan.json")
    if "structures_of" in job.run:
        joint = read_json(ROOT / job.name / f"{job.run['structures_of']}.result.json")
        seen = joint["structures"][job.datasets[0]["name"]]
        return {"steps": max(round(seen / structures_per_step(job, shards)), 1)}
    steps, out = job.spec["probe_steps"], job.folder / "probe"
    job.train(shards, out, steps)  # compiles; the next run starts from the compiler's cache, as the planned run will
    seconds = job.train(shards, out, steps)
    rows = train_rows(out)[1:]
    per_step = 1.0 / statistics.median(row["steps_per_s"] for row in rows)
    start = max(seconds - steps * per_step, 0.0)
    planned = job.spec["steps"] if "steps" in job.spec else int((job.spec["seconds"] - start) / per_step)
    rate = statistics.median(row["structures_per_s"] for row in rows)
    return {"steps": planned, "seconds": start + planned * per_step, "structures_per_s": rate}


def structures_per_step(job: ResultRun, shards: list[Path]) -> float:
    """Return the mean number of structures in a step, measured in a few steps."""
    out = job.folder / "probe"
    job.train(shards, out, job.spec["probe_steps"])
    return sum(structures_seen(out).values()) / job.spec["probe_steps"]


def structures_seen(out: Path) -> Counter[str]:
    """Return the number of structures of each task on which a run has trained."""
    seen: Counter[str] = Counter()
    for row in train_rows(out):
        seen.update({name: task["structures"] for name, task in row["tasks"].items()})
    return seen


def result(job: ResultRun, shards: list[Path]) -> dict[str, Any]:
    """Train the planned steps, evaluate, and return the errors and costs."""
    planned = read_json(job.path("plan"))
    out = job.folder / "run"
    took = job.train(shards, out, planned["steps"])
    command("evaluate", out)
    found = {}
    if "peers" in job.spec:
        command("evaluate", out, "--split", "val", "--out", out / "val")
        found = errors_and_costs(out, out / "val", shards[0], job.datasets[0])
    return {
        **planned,
        **found,
        "took": took,
        "memory_mb": max(row["memory_mb"] for row in train_rows(out)),
        "structures": structures_seen(out),
        "tasks": read_json(out / "evaluation.json")["tasks"],
        "model": read_json(out / "run.json")["model"],
    }


def make(kind: str, job: ResultRun, data: Path) -> None:
    """Make the plan or result of a run if it does not exist."""
    if not job.path(kind).exists():
        found = {"plan": plan, "result": result}[kind](job, job.shards(data))
        write_json(job.path(kind), found)
        sys.stdout.write(f"{job.label}: {json.dumps(found)}\n")
        sys.stdout.flush()
