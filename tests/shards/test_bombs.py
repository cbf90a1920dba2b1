"""Small files that stand for gigabytes are refused before memory is taken for them."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

MEGABYTES = 400
"""Memory that reading such a file may take."""


def no_line_end(folder: Path) -> Path:
    path = folder / "a.xyz"
    with open(path, "wb") as file:
        file.write(b"1\n")
        file.seek(1 << 31)  # the rest is a hole, which reads as 2 GB of zeros
        file.write(b"x")
    return path


def no_line_end_compressed(folder: Path) -> Path:
    path = folder / "a.xyz.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"1\n")
        for _ in range(600):
            file.write(b"a" * 1_000_000)
    return path


def nested(folder: Path) -> Path:
    path = folder / "a.json"
    path.write_text("[" * 100_000)
    return path


def nested_comment(folder: Path) -> Path:
    path = folder / "a.xyz"
    comments = [f'x="_JSON {"[" * 100_000}"', f"x={'[' * 100_000}"]
    path.write_text("".join(f"1\nProperties=species:S:1:pos:R:3 {comment}\nH 0 0 0\n" for comment in comments))
    return path


def large_array(folder: Path) -> Path:
    """An npz of 1 kB whose arrays have 3e9 numbers according to their headers."""
    path, header = folder / "a.npz", io.BytesIO()
    description = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 1000, 3)}
    np.lib.format.write_array_header_1_0(header, description)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("R", "z"):
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(1000))
    return path


def many_atoms(folder: Path) -> Path:
    path = folder / "a.xyz"
    path.write_text("999999999999\nProperties=species:S:1:pos:R:3\nH 0 0 0\n")
    return path


BOMBS = {make.__name__: make for make in (no_line_end, no_line_end_compressed, nested, nested_comment)}
BOMBS |= {make.__name__: make for make in (large_array, many_atoms)}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused(tmp_path, case):
    path = BOMBS[case](tmp_path)
    code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.readers import read_frames
from hydrazero.shards.readers.frames import ReadSettings
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
faults = []
try:
    faults += [frame.error for frame in read_frames(Path({str(path)!r}), ReadSettings())]
except HydrazeroError as error:
    faults.append(error)
print(len(faults), all(isinstance(fault, HydrazeroError) for fault in faults))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, megabytes = done.stdout.strip().splitlines()
    assert outcome.endswith("True") and not outcome.startswith("0 ") and int(megabytes) < MEGABYTES
