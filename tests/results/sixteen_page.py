"""Write the page about the run of sixteen real tasks: `python -m results.sixteen_page RUN_DIR`.

The run is `hydrazero train launch/runs/sixteen.toml --ranks 2`, evaluated by `hydrazero evaluate`. Errors of tasks
trained alone come from the runs behind the page on balancing, where these exist.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from results.jobs import PAGES, ROOT, train_rows
from results.tables import ERRORS, table

from hydrazero.shards.files import read_json
from hydrazero.trainer.report.history import learning_curves
from hydrazero.trainer.report.page import parity_picture
from hydrazero.trainer.report.run_data import read_run

SHORT = {"energies": "E", "forces": "F"}

TEXT = """# Sixteen real tasks, one model

One model for sixteen real tasks of eleven datasets: metals and alloys, oxides, water and molecules, at levels of
theory from LDA to CCSD(T). `make sixteen DATA=FOLDER` converts the datasets. Then these commands train,
evaluate and export the model and write this page:

```sh
hydrazero train launch/runs/sixteen.toml --ranks {ranks}
hydrazero evaluate {run}
hydrazero export {run} --out {run}/model.safetensors
PYTHONPATH=tests python -m results.sixteen_page {run}
```

The model (`{encoder}` with {features} features and {layers} layers, tasks balanced by `{method}`) trained for
{steps:,} steps in {minutes:.0f} minutes with {ranks} ranks on 2 CPU cores.

| task | content | structures |
| --- | --- | --- |
| `wbe` | tungsten and beryllium: bulk, surfaces, defects, liquids | 25,422 |
| `qm7_pbe0`, `qm7_dftb` | organic molecules of QM7; energies only | 7,101 each |
| `nbmotaw` | alloys of Nb, Mo, Ta and W | 5,658 |
| `mlearn_pymatgen` | elements: Li, Mo, Si and Ge | 979 |
| `mlearn_jarvis` | elements: Cu and Ni | 649 |
| `ethanol_pbe` | ethanol and methanol in molecular dynamics | 2,300 |
| `ethanol_ccsdt` | ethanol | 1,000 |
| `3bpa` | a drug-like molecule, 3-(benzyloxy)pyridin-2-amine | 1,004 |
| `bo2_lda` to `bo2_am05` | SnO2, TiO2, VO2, RuO2 and IrO2 with four functionals | 295 each |
| `lips` | lithium thiophosphate, a solid electrolyte | 200 |
| `water_pbe0ts` | liquid water and ice | 400 |
| `water_rpbed3` | water and ice | 20 |

The next table shows mean absolute errors on the test sets: E for energies in meV/atom, F for forces in meV/Å.

- *trivial*: the error of predicting the task's reference energies alone and zero forces.
- *alone*: the error of a model trained on this task alone. It saw as many structures of the task as a quarter of an
  hour of joint training draws from it, so it trained for a shorter time than the joint model here.
  [Balancing](balancing.md) compares the two at equal numbers of structures.

The forces of the bo2 tasks are so small that no run has a smaller error than predicting zero.
"""


def numbers(run: Path) -> dict[str, Any]:
    """Return what the page says about the run."""
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
    """Return the table of errors by task."""
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
    """Format a number with three digits, nothing for None."""
    return "" if value is None else f"{value:#.3g}".rstrip(".")


def main() -> None:
    """Write sixteen.md and its pictures."""
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
