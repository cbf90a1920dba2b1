"""Folders of checkpoints: listing, checking, naming and removing them."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.shards.files import read_json, write_json
from hydrazero.shards.text.names import path_fault

CHECKPOINTS = "checkpoints"
CHECKSUMS_NAME = "checksums.json"
"""File with the SHA-256 of each file of a checkpoint; written last, so that a folder that has it is complete."""
BEST_NAME = "best.json"
"""File beside the checkpoints: step and validation loss of the best one."""
READ_ENDINGS = (".pt", ".safetensors")
"""Endings of the files of a checkpoint that are read."""
PART = ".part"
"""Ending of a folder's name while it is being written."""
REMOVED = ".removed"
"""Ending of a folder's name while it is being removed."""
DAMAGED = ".damaged"
"""Ending of the name of a folder whose files are damaged."""


class BestCheckpoint(BaseModel):
    """The content of `best.json`."""

    step: int
    loss: float | None = None


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder for the checkpoint of a step."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run by rising step."""
    found = (run_dir / CHECKPOINTS).glob("step-*")
    return sorted(p for p in found if re.fullmatch(r"step-\d{8}", p.name) and (p / CHECKSUMS_NAME).is_file())


def has_checkpoint(run_dir: Path, step: int) -> bool:
    """Return whether the complete checkpoint of a step exists."""
    return folder_of(run_dir, step) in checkpoints(run_dir)


def latest_checkpoint(run_dir: Path) -> Path:
    """Return the last complete checkpoint; raises ConfigError if the run has none."""
    found = checkpoints(run_dir)
    if not found:
        raise ConfigError(f"{run_dir} holds no checkpoint; train the run first.")
    return found[-1]


def best_checkpoint(run_dir: Path) -> Path:
    """Return the checkpoint of the lowest validation loss, or the last one of a run that does not keep the best.

    Raises ConfigError if it has been removed.
    """
    pointer = run_dir / CHECKPOINTS / BEST_NAME
    if not pointer.is_file():
        return latest_checkpoint(run_dir)
    step = read_json(pointer, shape=BestCheckpoint)["step"]
    if not has_checkpoint(run_dir, step):
        raise ConfigError(f"{pointer} names step {step}, whose checkpoint does not exist; use the checkpoint 'last'.")
    return folder_of(run_dir, step)


def checkpoint_named(run_dir: Path, name: str) -> Path:
    """Return the checkpoint called 'best', 'last', or by its step; raises ConfigError if it does not exist."""
    if name == "best":
        return best_checkpoint(run_dir)
    if name == "last":
        return latest_checkpoint(run_dir)
    found = {str(step_of(folder)): folder for folder in checkpoints(run_dir)}
    if name not in found:
        known = ", ".join(["best", "last", *found])
        raise ConfigError(f"{run_dir} has no checkpoint '{name}'; choose one of {known}.")
    return found[name]


def file_sum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, as part of a sentence; None if they are intact."""
    try:
        sums = read_json(folder / CHECKSUMS_NAME, shape=dict[str, str])
        if not sums:
            return f"{folder / CHECKSUMS_NAME} names no file"
        for name, expected in sums.items():
            if (fault := path_fault(folder, name)) is not None:
                return f"{folder / name} {fault}"
            if file_sum(folder / name) != expected:
                return f"{folder / name} is damaged: its checksum differs from the one in {CHECKSUMS_NAME}"
        for ending in READ_ENDINGS:
            for path in folder.glob(f"*{ending}"):
                if path.name not in sums:
                    return f"{path} is not among the files in {CHECKSUMS_NAME}"
    except ConfigError as error:
        return str(error).removesuffix(".")
    except (OSError, ValueError) as error:
        return f"{folder} cannot be read ({error})"
    return None


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Raise ConfigError for what goes wrong because a checkpoint holds other values than its run has written."""
    try:
        yield
    except HydrazeroError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if type(error) is not RuntimeError and isinstance(error, RuntimeError):
            raise  # of a device or of the network
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ConfigError(
            f"checkpoint {folder} does not hold the state of this run ({reason}); use one that is intact."
        ) from error


def usable_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the last intact checkpoint (None if the run has none yet), and sentences on damaged ones after it.

    Damaged ones are renamed, and no longer used. Raises ConfigError if all are damaged, and then renames none.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(checkpoints(run_dir)):
        wrong = damage(folder)
        if wrong is None:
            return folder, [_rename_damaged(each, why) for each, why in damaged.items()]
        damaged[folder] = wrong
    if damaged:
        raise ConfigError(
            f"every checkpoint of {run_dir} is damaged: {'; '.join(damaged.values())}; restore one from a copy, or "
            f"remove {run_dir / CHECKPOINTS} to start again from step 0."
        )
    return None, []


def _rename_damaged(folder: Path, wrong: str) -> str:
    """Rename a damaged checkpoint, and return a sentence on it."""
    renamed = folder.with_name(folder.name + DAMAGED)
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    return f"warning: {wrong}; the checkpoint before it is used, and {folder.name} is renamed to {renamed.name}."


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: a process that is killed meanwhile leaves none that looks complete."""
    renamed = folder.with_name(folder.name + REMOVED)
    folder.rename(renamed)
    shutil.rmtree(renamed)


def remove_leftovers(run_dir: Path) -> None:
    """Remove the remains of a run that was killed while it wrote or removed a checkpoint."""
    for ending in (PART, REMOVED):
        for left in (run_dir / CHECKPOINTS).glob(f"step-*{ending}"):
            shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The checkpoints of a run that are kept when a new one is written."""

    last: int
    """Number of most recent checkpoints that are kept."""
    best: dict[str, float] | None
    """Step and validation loss of the best checkpoint, which is kept too; None if only the last ones are kept."""


def finish_checkpoint(part: Path, sums: dict[str, str], retention: Retention) -> None:
    """Give a written folder its final name, and remove the checkpoints that are no longer kept."""
    write_json(part / CHECKSUMS_NAME, sums)
    folder = part.with_name(part.name.removesuffix(PART))
    run_dir = folder.parent.parent
    for later in checkpoints(run_dir):
        if later >= folder:  # from before the run was resumed at an earlier step
            remove_checkpoint(later)
    part.rename(folder)
    best_folder = None if retention.best is None else folder_of(run_dir, int(retention.best["step"]))
    complete = checkpoints(run_dir)
    if best_folder in complete:
        write_json(folder.parent / BEST_NAME, retention.best)
    elif retention.best is None:  # it may name a step that is done again
        (folder.parent / BEST_NAME).unlink(missing_ok=True)
    for old in complete[: -retention.last]:
        if old != best_folder:
            remove_checkpoint(old)
