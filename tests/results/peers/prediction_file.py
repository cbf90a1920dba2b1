"""Predictions of a peer's model for a file of structures; imported in the peer's own environment.

python predict_PEER.py MODEL STRUCTURES.xyz OUT.npz
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import ase.io
import numpy as np
from ase import Atoms

BATCH = 10
"""Number of structures that are predicted together."""


def write_predictions(package: str, parameters: int, predict: Callable[[list[Atoms]], tuple]) -> None:
    """Predict the structures of the command line and write energies in eV, [S], and forces in eV/Å, [A, 3].

    `predict` returns both for a list of structures. The time, which includes the search for neighbours, is that of all
    structures after a first batch has been predicted once.
    """
    _, _, source, out = sys.argv
    structures = ase.io.read(source, ":")
    batches = [structures[first : first + BATCH] for first in range(0, len(structures), BATCH)]
    predict(batches[0])
    started = time.perf_counter()
    energies, forces = zip(*map(predict, batches), strict=True)
    seconds = time.perf_counter() - started
    np.savez(
        out,
        energy=np.concatenate(energies).reshape(-1).astype(np.float64),
        forces=np.concatenate(forces).astype(np.float64),
        structures_per_s=len(structures) / seconds,
        parameters=parameters,
        version=version(package),
    )
