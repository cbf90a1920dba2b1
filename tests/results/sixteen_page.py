"""The page of the run of sixteen real tasks: `python -m results.sixteen_page RUN_DIR`.

The run is `hydrazero train launch/runs/sixteen.toml --ranks 2`, evaluated by `hydrazero evaluate`. Errors of tasks
trained alone are those of the table of balancing, where it has been made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from results.jobs import PAGES, ROOT, train_rows
from results.tables import ERRORS, table

from hydrazero.trainer.records.run_files import read_json
from hydrazero.trainer.report.history import learning_curves
from hydrazero.trainer.report.page import parity_picture
from hydrazero.trainer.report.run_data import read_run

SHORT = {"energies": "E", "forces": "F"}

TEXT = """# Sixteen real tasks, one model

`make sixteen DATA=../shared/data` converts them, then

```sh
hydrazero train launch/runs/sixteen.toml --ranks {ranks}
hydrazero evaluate {run}
hydrazero export {run} --out {run}/model.safetensors
python -m results.sixteen_page {run}
```

{steps:,} steps took {minutes:.0f} minutes with {ranks} ranks on 2 CPU cores:
`{encoder}` with {features} features and {layers} layers, tasks balanced by `{method}`.
E: mean absolute error of energies, meV/atom; F: of forces, meV/Å; on the test sets. Trivial: the task's reference
energies alone and zero forces. Alone: a model of the task's own, trained on as many of its structures as a quarter of
an hour of all tasks gives it; on equally many structures the two are compared in [balancing.md](balancing.md). Forces
of the bo2 tasks are so small that no run comes below the trivial error.
"""


def numbers(run: Path) -> dict[str, Any]:
    """What the page says of the run as a whole."""
    record = read_json(run / "run.json")
    before, seconds = 0, 0.0
    for row in train_rows(run):
        seconds += (row["step"] - before) / row["steps_per_s"]
        before = row["step"]
    return {
        "run": run,
        "ranks": record["ranks"],
        "steps": before,
        "minutes": seconds / 60,
        **{key: record["model"][key] for key in ("encoder", "features", "layers")},
        "method": record["balance"]["method"],
    }


def errors(run: Path) -> list[str]:
    """The table of the tasks."""
    rows = []
    for name, found in read_json(run / "evaluation.json")["tasks"].items():
        path = ROOT / "balancing" / f"{name}-alone.result.json"
        alone = read_json(path)["tasks"][name] if path.exists() else {}
        row = [f"`{name}`", found["fidelity"], f"{found['structures']:,}"]
        for key in ERRORS.values():
            row += [number(found[key]), number(found[f"trivial_{key}"]), number(alone.get(key))]
        rows.append(row)
    headings = ["task", "fidelity", "test structures"]
    headings += [f"{short} {what}".strip() for short in SHORT.values() for what in ("", "trivial", "alone")]
    return table(headings, rows)


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:#.3g}".rstrip(".")


def main() -> None:
    """Write sixteen.md and its pictures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    parity_picture(run, PAGES / "sixteen-parity.png")
    learning_curves([read_run(run, run.name)]).savefig(PAGES / "sixteen-learning.png", dpi=100)
    lines = [TEXT.format(**numbers(run)), *errors(run)]
    lines += ["![Predicted against true energies and forces of the test sets](sixteen-parity.png)", ""]
    lines += ["![Errors on the validation sets over the steps](sixteen-learning.png)", ""]
    (PAGES / "sixteen.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
