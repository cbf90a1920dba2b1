"""Files that were damaged at random, with right checksums, load with finite numbers or are refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import damaged_files
import pytest

SCRIPT = Path(damaged_files.__file__)


def check(kind: str, seed: int, seconds: float, most: int) -> str:
    """Check examples in a process of their own, which a fault may end; return what it prints."""
    words = [sys.executable, str(SCRIPT), kind, str(seed), str(seconds), str(most)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=seconds + 120, check=False)
    assert done.returncode == 0, f"exit status {done.returncode} after {done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("kind", damaged_files.EXAMPLES)
def test_a_few_damaged_files(kind):
    assert check(kind, 0, 3.0, 200).startswith(f"{kind}: ")


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", damaged_files.EXAMPLES)
def test_damaged_files_for_minutes(kind, fuzz_seconds):
    seed = int(os.environ.get("HYDRAZERO_FUZZ_SEED", time.time_ns() % 2**31))
    print(check(kind, seed, fuzz_seconds, sys.maxsize))
