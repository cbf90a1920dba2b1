"""Files that a killed process has left cut off in the compiler's cache, where the next one takes them as done."""

from __future__ import annotations

import contextlib
import functools
import struct
import time
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import cache_dir

_STARTED = time.time()


def is_cut_off(path: Path) -> bool:
    """Whether an ELF file is shorter than its header says: its table of sections comes last (ELF-64, e_shoff)."""
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
    """Remove, once in a process, what was cut off before it began; later files others may still be writing.

    The compiler would fail to load such a file, or take a cut-off trial of the processor's vectors as their absence and
    make slow code.
    """
    folder = Path(cache_dir())
    for path in [*folder.rglob("*.so"), *folder.rglob("*.o")]:
        # Another rank may have removed it, or it is somebody else's; what cannot be used is found out in compiling.
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < _STARTED and is_cut_off(path):
                path.unlink()
