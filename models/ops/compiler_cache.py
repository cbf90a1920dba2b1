"""Removal of truncated files that a killed process has left in the compiler's cache."""

from __future__ import annotations

import contextlib
import functools
import struct
import time
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import cache_dir

_STARTED = time.time()


def is_cut_off(path: Path) -> bool:
    """Return whether an ELF file is shorter than its header says; the section table comes last (ELF-64, e_shoff)."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return True
    if header[:5] != b"\x7fELF\x02":
        return False
    offset, entry_size, entries = *struct.unpack_from("<Q", header, 40), *struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < offset + entry_size * entries


@functools.cache
def remove_cut_off_files() -> None:
    """Remove truncated files from before this process started, once per process; others may still write newer files.

    The compiler would fail to load such a file, or take a truncated test of the vector instructions for their absence
    and generate slow code.
    """
    folder = Path(cache_dir())
    for path in [*folder.rglob("*.so"), *folder.rglob("*.o")]:
        # Another rank may have removed it, or it belongs to another user; the compiler reports what it cannot use.
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < _STARTED and is_cut_off(path):
                path.unlink()
