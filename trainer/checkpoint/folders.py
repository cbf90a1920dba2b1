"""Folders of checkpoints: which are complete, which is the best, and whether one is damaged."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.records.run_files import read_json, write_json

CHECKPOINTS = "checkpoints"
CHECKSUMS_NAME = "checksums.json"
"""SHA-256 of each file of a checkpoint; written last, so that a folder with it is complete."""
BEST_NAME = "best.json"
"""Beside the checkpoints: step and validation loss of the best one."""
PART = ".part"
"""Ending of a folder that is being written."""
REMOVED = ".removed"
"""Ending of a folder that is being removed."""
DAMAGED = ".damaged"
"""Ending of a folder whose files are not what they were."""


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the last one last."""
    found = (run_dir / CHECKPOINTS).glob("step-*")
    return sorted(p for p in found if re.fullmatch(r"step-\d{8}", p.name) and (p / CHECKSUMS_NAME).is_file())


def is_kept(run_dir: Path, step: int) -> bool:
    """Whether the complete checkpoint of a step is there."""
    return folder_of(run_dir, step) in checkpoints(run_dir)


def latest_checkpoint(run_dir: Path) -> Path:
    """Return the last complete checkpoint; raises ConfigError if the run has none."""
    found = checkpoints(run_dir)
    if not found:
        raise ConfigError(f"{run_dir} holds no checkpoint; train it first.")
    return found[-1]


def best_checkpoint(run_dir: Path) -> Path:
    """Return the checkpoint of the lowest validation loss, or the last one of a run that keeps no best.

    Raises ConfigError if it has been taken away.
    """
    pointer = run_dir / CHECKPOINTS / BEST_NAME
    if not pointer.is_file():
        return latest_checkpoint(run_dir)
    step = int(read_json(pointer)["step"])
    if not is_kept(run_dir, step):
        raise ConfigError(f"{pointer} names step {step}, whose checkpoint is not there; use the checkpoint 'last'.")
    return folder_of(run_dir, step)


def checkpoint_named(run_dir: Path, name: str) -> Path:
    """Return the checkpoint called 'best', 'last', or by its step; raises ConfigError if it is not there."""
    if name == "best":
        return best_checkpoint(run_dir)
    if name == "last":
        return latest_checkpoint(run_dir)
    found = {str(step_of(folder)): folder for folder in checkpoints(run_dir)}
    if name not in found:
        there = ", ".join(["best", "last", *found])
        raise ConfigError(f"{run_dir} has no checkpoint '{name}'; it has {there}.")
    return found[name]


def file_sum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint's files, None if nothing is."""
    try:
        sums = json.loads((folder / CHECKSUMS_NAME).read_text(encoding="utf-8"))
        if not sums:
            return f"{folder / CHECKSUMS_NAME} names no file"
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{folder / name} is missing"
            if file_sum(folder / name) != expected:
                return f"{folder / name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder} cannot be read ({error})"
    return None


def usable_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the last checkpoint that is whole, None if the run has none yet, and sentences on damaged ones.

    Damaged ones are renamed, and lost to the run. Raises ConfigError if all are damaged, which leaves them as they are.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(checkpoints(run_dir)):
        wrong = damage(folder)
        if wrong is None:
            return folder, [_set_aside(each, why) for each, why in damaged.items()]
        damaged[folder] = wrong
    if damaged:
        raise ConfigError(
            f"every checkpoint of {run_dir} is damaged: {'; '.join(damaged.values())}; bring one back from a copy, or "
            f"remove {run_dir / CHECKPOINTS} to start again from step 0."
        )
    return None, []


def _set_aside(folder: Path, wrong: str) -> str:
    """Rename a damaged checkpoint; returns a sentence on it."""
    aside = folder.with_name(folder.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return f"warning: {wrong}; the checkpoint before it is used, and {folder.name} is kept as {aside.name}."


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; killed meanwhile, it leaves none that looks complete."""
    aside = folder.with_name(folder.name + REMOVED)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a run has left that was killed while it wrote or removed a checkpoint."""
    for ending in (PART, REMOVED):
        for left in (run_dir / CHECKPOINTS).glob(f"step-*{ending}"):
            shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which checkpoints of a run stay."""

    last: int
    """So many of the last ones."""
    best: dict[str, float] | None
    """Step and validation loss of the best one; None if it is not kept for that."""


def finish_checkpoint(part: Path, sums: dict[str, str], kept: Kept) -> None:
    """Give a written folder its name, and remove what is no longer kept."""
    write_json(part / CHECKSUMS_NAME, sums)
    folder = part.with_name(part.name.removesuffix(PART))
    run_dir = folder.parent.parent
    for later in checkpoints(run_dir):
        if later >= folder:  # of steps that this run has gone back from
            remove_checkpoint(later)
    os.replace(part, folder)
    best_folder = None if kept.best is None else folder_of(run_dir, int(kept.best["step"]))
    complete = checkpoints(run_dir)
    if best_folder in complete:
        write_json(folder.parent / BEST_NAME, kept.best)
    elif kept.best is None:  # the one that it names may be of steps that are done again
        (folder.parent / BEST_NAME).unlink(missing_ok=True)
    for old in complete[: -kept.last]:
        if old != best_folder:
            remove_checkpoint(old)
