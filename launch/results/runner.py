"""Runs of a table of results, one after the other, each skipped when its result is there; the table is written anew.

    python -m hydrazero.launch.results.runner NAME DATA [--only DATASET-RUN]

NAME.toml beside this file lists datasets and runs, NAME.run.toml is the run file of all of them with places to fill in.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrazero.trainer.run_files import write_json

HERE = Path(__file__).parent
ROOT = Path("runs/results")


def command(*words: object) -> str:
    """Run a command of hydrazero and return what it prints; stops the runner with what it says if it fails."""
    line = [str(Path(sys.executable).with_name("hydrazero")), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def shards_of(data: dict[str, Any], root: Path, folder: Path) -> Path:
    """Convert a dataset, unless it has been."""
    out = folder / "data" / str(data["name"])
    if not out.exists():
        sources = [root / source for source in data["sources"]]
        command("convert", *sources, "--task", data["name"], "--out", out, "--config", data["convert"])
    return out


def train_rows(out: Path) -> list[dict[str, Any]]:
    """Rows of training in a run's metrics."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run on one dataset."""

    spec: dict[str, Any]
    name: str
    """Of the table."""
    data: dict[str, Any]
    run: dict[str, Any]

    @property
    def label(self) -> str:
        """Name of the job's files."""
        return f"{self.data['name']}-{self.run['name']}"

    @property
    def folder(self) -> Path:
        """Where its runs live."""
        return ROOT / self.name / self.label

    def path(self, kind: str) -> Path:
        """File of its 'plan' or 'result'."""
        return ROOT / self.name / f"{self.label}.{kind}.json"

    def train(self, shards: Path, out: Path, steps: int) -> float:
        """Train so many steps; returns the seconds that it took."""
        structures = self.spec.get("structures", 4)
        batch = command("inspect", shards, "--propose-batch", "--structures", structures, "--cutoff", 5.0)
        template = (HERE / f"{self.name}.run.toml").read_text(encoding="utf-8")
        names = {"data": self.data["name"], "name": self.run["name"], "shards": shards, "batch": batch}
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        path = out.with_suffix(".toml")
        path.write_text(template.format(out=out, steps=steps, **names), encoding="utf-8")
        started = time.monotonic()
        command("train", path, "--ranks", self.spec["ranks"])
        return time.monotonic() - started


def plan(job: Job, shards: Path) -> dict[str, Any]:
    """Find by a short run how many steps fit the time, or how long so many steps take.

    Nothing else should need the machine meanwhile.
    """
    steps, out = job.spec["probe_steps"], job.folder / "probe"
    job.train(shards, out, steps)  # compiles; the next one starts as the run will, from the compiler's cache
    seconds = job.train(shards, out, steps)
    rows = train_rows(out)[1:]
    per_step = 1.0 / statistics.median(row["steps_per_s"] for row in rows)
    start = max(seconds - steps * per_step, 0.0)
    planned = job.spec["steps"] if "steps" in job.spec else int((job.spec["seconds"] - start) / per_step)
    rate = statistics.median(row["structures_per_s"] for row in rows)
    return {"steps": planned, "seconds": start + planned * per_step, "structures_per_s": rate}


def result(job: Job, shards: Path) -> dict[str, Any]:
    """Train the planned steps and evaluate."""
    planned = read(job.path("plan"))
    out = job.folder / "run"
    job.train(shards, out, planned["steps"])
    command("evaluate", out)
    memory = max(row["memory_mb"] for row in train_rows(out))
    tasks, model = read(out / "evaluation.json")["tasks"], read(out / "run.json")["model"]
    return {**planned, "memory_mb": memory, "tasks": tasks, "model": model}


def read(path: Path) -> dict[str, Any]:
    """Read a JSON document."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write_table(spec: dict[str, Any], name: str) -> Path:
    """Write NAME.md of the results that are there."""
    lines = [f"# {spec['title']}", "", spec["text"], ""]
    headings = ["run", "energy MAE, meV/atom", "force MAE, meV/Å", "structures/s", "steps", "seconds"]
    headings += ["MB per rank"] if spec.get("memory") else []
    for data in spec["data"]:
        lines += [
            f"## {data['name']}",
            "",
            f"{data['text']}.",
            "",
            "| " + " | ".join(headings) + " |",
            "|" + "---|" * len(headings),
        ]
        for run in spec["runs"]:
            path = Job(spec=spec, name=name, data=data, run=run).path("result")
            if not path.exists():
                lines.append(f"| `{run['name']}` | not run yet" + " |" * (len(headings) - 1))
                continue
            row = read(path)
            errors = row["tasks"][data["name"]]
            energy, force = errors["energy_mae_mev_per_atom"], errors["force_mae_mev_per_angstrom"]
            memory = f" {row['memory_mb']:,.0f} |" if spec.get("memory") else ""
            lines.append(
                f"| `{run['name']}` | {energy:.2f} | {force:.1f} | {row['structures_per_s']:.0f} | {row['steps']:,} | "
                f"{row['seconds']:.0f} |{memory}"
            )
        lines.append("")
    lines += [f"Made by `make results NAME={name} DATA=../shared/data`.", ""]
    path = HERE / f"{name}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Do what is missing: first all plans, then the runs, which may share the machine, since their steps are fixed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", help="one run, DATASET-RUN")
    options = parser.parse_args()
    spec = tomllib.loads((HERE / f"{options.name}.toml").read_text(encoding="utf-8"))
    jobs = [Job(spec=spec, name=options.name, data=data, run=run) for data in spec["data"] for run in spec["runs"]]
    jobs = [job for job in jobs if options.only in (None, job.label)]
    for kind, make in (("plan", plan), ("result", result)):
        for job in jobs:
            if job.path(kind).exists():
                continue
            found = make(job, shards_of(job.data, options.data, ROOT / options.name))
            write_json(job.path(kind), found)
            sys.stdout.write(f"{job.label}: {json.dumps(found)}\n")
            sys.stdout.flush()
            write_table(spec, options.name)
    sys.stdout.write(f"{write_table(spec, options.name)}\n")


if __name__ == "__main__":
    main()
