"""The working folder of a conversion, which keeps finished work when the conversion is killed and started again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_json, try_lock, write_json
from hydrazero.shards.manifest import FORMAT_VERSION
from hydrazero.shards.text.foreign_text import escaped


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion; every worker receives a copy of it."""

    task: str
    sources: tuple[Path, ...]
    names: tuple[str, ...]
    """Distinct names of the sources, with which source ids begin."""
    settings: ConvertSettings
    skip_bad: bool
    trust_pickle: bool
    folder: Path
    """Working folder, beside the folder that is to be made."""
    not_read: tuple[str, ...] = ()
    """Sentences on files beside the sources that are not read."""

    @property
    def frames(self) -> Path:
        """Folder of the chunks of frames that have been read."""
        return self.folder / "frames"

    @property
    def shards(self) -> Path:
        """Folder of the shards, which is renamed to the output folder at the end."""
        return self.folder / "shards"

    @property
    def notes(self) -> Path:
        """Folder of the notes of finished shards."""
        return self.folder / "notes"

    @property
    def stop(self) -> Path:
        """File whose presence asks the workers to stop."""
        return self.folder / "stop"

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that the shards depend on; unfinished work with another fingerprint is discarded."""
        stats = [source.stat() for source in self.sources]
        files = [
            [str(source.resolve()), stat.st_size, stat.st_mtime_ns]
            for source, stat in zip(self.sources, stats, strict=True)
        ]
        settings = json.loads(json.dumps(self.settings.model_dump(), default=str))
        return {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "sources": files,
            "settings": settings,
            "skip_bad": self.skip_bad,
        }


@contextmanager
def working_folder(job: Conversion) -> Iterator[None]:
    """Set up and lock the working folder, and keep unfinished work of the same conversion in it.

    Raises ConfigError if another process uses the folder, or if it cannot be made.
    """
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{job.folder} cannot be made ({error.strerror}).") from error
    lock = try_lock(job.folder / "lock")
    if lock is None:
        raise ConfigError(f"another process is converting into {job.folder}; wait for it or stop it.")
    with lock:
        about = job.folder / "job.json"
        wanted = job.fingerprint()
        if not about.is_file() or _content(about) != wanted:
            about.unlink(missing_ok=True)
            for folder in (job.frames, job.shards, job.notes):
                shutil.rmtree(folder, ignore_errors=True)
            (job.folder / "index.sqlite").unlink(missing_ok=True)
            write_json(about, wanted, durable=True)
        job.stop.unlink(missing_ok=True)
        for folder in (job.frames, job.shards, job.notes):
            if folder.is_symlink():  # never made by a conversion, and would lead what it writes elsewhere
                folder.unlink()
            folder.mkdir(exist_ok=True)
        yield


def _content(path: Path) -> Any:
    """Return what a JSON file holds; None if it is damaged, and what it describes is to be made anew."""
    try:
        return read_json(path)
    except ConfigError:
        return None


def distinct_names(sources: Sequence[Path]) -> tuple[str, ...]:
    """Return a name for each source: that of the file, or its path below the common folder if two names are equal."""
    paths = [Path(os.path.abspath(source)) for source in sources]
    if len({path.name for path in paths}) == len(set(paths)):
        return tuple(escaped(path.name) for path in paths)
    common = os.path.commonpath([path.parent for path in paths])
    return tuple(escaped(path.relative_to(common).as_posix()) for path in paths)
