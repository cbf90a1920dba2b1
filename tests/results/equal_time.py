"""Encoders and other tools in equal time: the runs of the others, and tables of errors and costs of all."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results.jobs import ROOT, ResultRun
from results.peers.run import PeerRun
from results.tables import table, write_page

from hydrazero.shards.files import read_json, write_json
from hydrazero.trainer.records.task_errors import KEYS

MEASURES = {
    "energy, meV/atom": (KEYS["energy_mae"], "energy_rmse_mev_per_atom", 2),
    "force, meV/Å": (KEYS["force_mae"], "force_rmse_mev_per_angstrom", 1),
}
"""Headings of errors, and the names of the mean absolute and the root mean square one, with their digits."""
ENVIRONMENTS = Path(".bench")


def peer_runs(spec: dict[str, Any], name: str) -> dict[str, PeerRun]:
    """Return the peers' runs of a table by label, each in the table's time with as many threads as there are ranks."""
    runs = {}
    for data in spec["data"]:
        for peer in spec.get("peers", []):
            label = f"{data['name']}-{peer['name']}"
            runs[label] = PeerRun(
                peer=peer,
                dataset=data,
                seconds=spec["seconds"],
                threads=spec["ranks"],
                seed=1,
                environments=ENVIRONMENTS,
                work=ROOT / name / label,
            )
    return runs


def make_peer(run: PeerRun, spec: dict[str, Any], name: str, data: Path) -> None:
    """Make the result of a peer's run if it does not exist, on the same shards as hydrazero's runs."""
    path = run.work.with_suffix(".result.json")
    if path.exists():
        return
    (shards,) = ResultRun(spec=spec, name=name, datasets=(run.dataset,), run={}).shards(data)
    found = run.result(shards)
    write_json(path, found)
    sys.stdout.write(f"{run.work.name}: {json.dumps(found)}\n")
    sys.stdout.flush()


def write_equal_time(spec: dict[str, Any], name: str, jobs: Sequence[ResultRun]) -> Path:
    """Write NAME.md with the results that exist so far; return its path."""
    return write_page(spec, name, equal_time_tables(spec, name, jobs))


def equal_time_tables(spec: dict[str, Any], name: str, jobs: Sequence[ResultRun]) -> list[str]:
    """Return two tables for each dataset: errors and costs of each run, and errors on each group of the test set."""
    results = {job.label: job.path("result") for job in jobs}
    results |= {label: ROOT / name / f"{label}.result.json" for label in peer_runs(spec, name)}
    lines = []
    for data in spec["data"]:
        rows = [entry["name"] for entry in (*spec["runs"], *spec.get("peers", []))]
        found = {row: results[f"{data['name']}-{row}"] for row in rows}
        finished = {row: read_json(path) for row, path in found.items() if path.exists()}
        groups = [group["name"] for group in data.get("groups", [])]
        headings = ["run", *(f"{split}: {measure}" for split in ("validation", "test") for measure in MEASURES)]
        headings += ["parameters", "structures/s", "predicted/s", "seconds"]
        lines += [f"## {data['name']}", "", f"{data['text']}.", ""]
        lines += table(headings, [_line(row, finished.get(row), len(headings)) for row in rows])
        if groups:
            of_groups = [f"{group}: {measure}" for group in groups for measure in MEASURES]
            cells = {
                row: [cell for group in groups for cell in _errors(one["groups"][group])]
                for row, one in finished.items()
            }
            lines += table(["run", *of_groups], [[f"`{row}`", *line] for row, line in cells.items()])
    return lines


def _errors(errors: dict[str, float]) -> list[str]:
    """Return the cells of energies and forces, 'MAE / RMSE'."""
    return [f"{errors[mae]:.{digits}f} / {errors[rmse]:.{digits}f}" for mae, rmse, digits in MEASURES.values()]


def _line(name: str, found: dict[str, Any] | None, length: int) -> list[str]:
    """Return the row of a run, or that it is missing."""
    if found is None:
        return [f"`{name}`", "not run yet", *[""] * (length - 2)]
    costs = [f"{found['parameters']:,}", f"{found['structures_per_s']:.0f}", f"{found['predicted_per_s']:.0f}"]
    version = f" {found['version']}" if "version" in found else ""
    return [f"`{name}`{version}", *_errors(found["val"]), *_errors(found["test"]), *costs, f"{found['seconds']:.0f}"]
