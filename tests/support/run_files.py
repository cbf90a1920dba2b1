"""The run file of a small run of two tasks, in which tests change what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydrazero.shards.files import toml_text


def write_small_run(folder: Path, data_folder: Path, /, **sections: Any) -> Path:
    """Write `folder`/run.toml of a run in `folder`/run on two tasks of `data_folder`; return its path.

    The values of `sections` replace those given here.
    """
    table: dict[str, Any] = {
        "run": {"out": str(folder / "run")},
        "tasks": [{"name": name, "shards": str(data_folder / name)} for name in ("molecules", "metals")],
        "model": {"features": 12, "layers": 2, "radial_functions": 6, "cutoff": 4.0, "head_features": 6},
        "batch": {"structures": 8, "atoms": 48, "slots": 1536},
        "balance": {"method": "gradnorm", "every": 3},
        "train": {},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section} if isinstance(section, dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    path.write_text(toml_text(table), encoding="utf-8")
    return path
