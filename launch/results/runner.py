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
from pathlib import Path
from typing import Any

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


def do_run(spec: dict[str, Any], name: str, data: dict[str, Any], run: dict[str, Any], shards: Path) -> dict[str, Any]:
    """Find how many steps fit the time, train, evaluate; returns the result."""
    folder = ROOT / name / f"{data['name']}-{run['name']}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    batch = command("inspect", shards, "--propose-batch", "--structures", spec.get("structures", 4), "--cutoff", 5.0)
    template = (HERE / f"{name}.run.toml").read_text(encoding="utf-8")

    def train(label: str, steps: int) -> tuple[float, Path]:
        out = folder / label
        path = folder / f"{label}.toml"
        text = template.format(
            out=out, data=data["name"], shards=shards, batch=batch, steps=steps, name=run["name"]
        )
        path.write_text(text, encoding="utf-8")
        started = time.monotonic()
        command("train", path, "--ranks", spec["ranks"])
        return time.monotonic() - started, out

    # The first probe compiles; the second starts as the run will, from the compiler's cache.
    train("probe", spec["probe_steps"])
    shutil.rmtree(folder / "probe")
    seconds, out = train("probe", spec["probe_steps"])
    per_step = 1.0 / statistics.median(row["steps_per_s"] for row in train_rows(out)[1:])
    start = max(seconds - spec["probe_steps"] * per_step, 0.0)
    steps = int((spec["seconds"] - start) / per_step)
    seconds, out = train("run", steps)
    command("evaluate", out)
    errors = json.loads((out / "evaluation.json").read_text())["tasks"][data["name"]]
    rate = statistics.median(row["structures_per_s"] for row in train_rows(out))
    model = json.loads((out / "run.json").read_text())["model"]
    return {
        "steps": steps,
        "seconds": seconds,
        "structures_per_s": rate,
        "energy_mae_mev_per_atom": errors["energy_mae_mev_per_atom"],
        "force_mae_mev_per_angstrom": errors["force_mae_mev_per_angstrom"],
        "structures": errors["structures"],
        "model": model,
    }


def write_table(spec: dict[str, Any], name: str) -> Path:
    """Write NAME.md of the results that are there."""
    lines = [f"# {spec['title']}", spec["text"], ""]
    for data in spec["data"]:
        lines += [
            f"## {data['name']}",
            "",
            f"{data['text']}.",
            "",
            "| run | energy MAE, meV/atom | force MAE, meV/Å | structures/s | steps | seconds |",
            "|---|---|---|---|---|---|",
        ]
        for run in spec["runs"]:
            path = ROOT / name / f"{data['name']}-{run['name']}.json"
            if not path.exists():
                lines.append(f"| `{run['name']}` | not run yet | | | | |")
                continue
            row = json.loads(path.read_text())
            energy, force = row["energy_mae_mev_per_atom"], row["force_mae_mev_per_angstrom"]
            lines.append(
                f"| `{run['name']}` | {energy:.2f} | {force:.1f} | {row['structures_per_s']:.0f} | {row['steps']:,} | "
                f"{row['seconds']:.0f} |"
            )
        lines.append("")
    lines += [f"Made by `make results NAME={name} DATA=../shared/data`.", ""]
    path = HERE / f"{name}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", help="one run, DATASET-RUN")
    options = parser.parse_args()
    spec = tomllib.loads((HERE / f"{options.name}.toml").read_text(encoding="utf-8"))
    for data in spec["data"]:
        for run in spec["runs"]:
            label = f"{data['name']}-{run['name']}"
            result = ROOT / options.name / f"{label}.json"
            if result.exists() or options.only not in (None, label):
                continue
            shards = shards_of(data, options.data, ROOT / options.name)
            found = do_run(spec, options.name, data, run, shards)
            part = result.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1) + "\n")
            os.replace(part, result)
            sys.stdout.write(f"{label}: {found}\n")
            write_table(spec, options.name)
    sys.stdout.write(f"{write_table(spec, options.name)}\n")


if __name__ == "__main__":
    main()
