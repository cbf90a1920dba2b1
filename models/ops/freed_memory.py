"""Memory that the C library keeps for the next step."""

from __future__ import annotations

import contextlib
import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt` in glibc."""
LARGEST_BLOCK = 32 * 2**20
"""Bytes up to which blocks come from the heap; glibc itself goes up to this for a program that frees such blocks."""
NEVER = 2**31 - 1


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep the memory at the end of the heap, once per process; other C libraries are left as they are.

    A compiled step allocates the same arrays each time. glibc returns them to the operating system as soon as some
    megabytes are free, and every page is cleared again in the next step: a fifth of the time of a step of TensorNet.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        library.mallopt(M_TRIM_THRESHOLD, NEVER)
