"""Readers of a rank that ends without stopping them end too, and leave nothing open that others wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sources import make_shards, metals

RANK = """
import os, signal, sys, time
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.stream.stream import StreamSettings, TrainStream
# Batches of so many structures are too long for a pipe, so that the reader waits to pass them on.
shape = BatchShape(structures=4000, atoms=40_000, slots=1_000_000)
stream = TrainStream(StreamSettings(folders=(sys.argv[1],), cutoff=2.0, shape=shape), 0, 1)
batches = iter(stream)
next(batches)
print("a batch", flush=True)
time.sleep(5)
os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "killed" else os._exit(70)
"""


@pytest.mark.parametrize("end", ["killed", "exit"])
def test_a_reader_does_not_outlive_its_rank(tmp_path, end):
    folder = make_shards(tmp_path, "metals", metals(30))
    # Returns once nobody holds the pipe of the output any more: the reader has inherited it.
    done = subprocess.run([sys.executable, "-c", RANK, str(folder), end], stdout=subprocess.PIPE, text=True, timeout=90)
    assert done.stdout == "a batch\n" and done.returncode == (-9 if end == "killed" else 70)
