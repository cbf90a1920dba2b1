"""Time per atom of training steps on batches of the sixteen real tasks together, and of each task alone."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from ours import Steps, model_of
from systems import CUTOFF, THREADS
from timing import hand_over, step_seconds

from hydrazero.models.ops.compiled import use_kernels
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.stream.batch_proposal import demand_of, propose
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, TrainStream

STRUCTURES = 48
BATCHES = 5


def seconds_per_atom(folders: tuple[str, ...]) -> float:
    """Return the seconds per atom of a training step on batches of the shape proposed for these tasks.

    Steps use the kernels but are not compiled, since there are seventeen shapes.
    """
    plain = StreamSettings(folders=folders, cutoff=CUTOFF, shape=BatchShape(structures=1, atoms=1, slots=8), workers=0)
    reader = SplitReader(plain, "train")
    shape = propose(demand_of(reader), reader, STRUCTURES)
    settings = StreamSettings(folders=folders, cutoff=CUTOFF, shape=shape, workers=0)
    model = model_of(len(folders))
    use_kernels(model)
    seconds, atoms = 0.0, 0
    for _, batch in zip(range(BATCHES), TrainStream(settings, 0, 1), strict=False):
        seconds += statistics.median(step_seconds(Steps(model, batch, compiled=False).train, 2))
        atoms += int(batch.atom_mask.sum())
    return seconds / atoms


def main() -> None:
    torch.set_num_threads(THREADS)
    folders = [str(folder) for folder in sorted(Path(sys.argv[1]).iterdir()) if (folder / "manifest.json").exists()]
    readers = [
        SplitReader(
            StreamSettings(folders=(folder,), cutoff=CUTOFF, shape=BatchShape(structures=1, atoms=1, slots=8)), "train"
        )
        for folder in folders
    ]
    atoms = [reader.readers[0].manifest.atoms("train") for reader in readers]
    alone = [seconds_per_atom((folder,)) for folder in folders]
    # This is the time that the atoms of the mixed batches would take in batches of single tasks.
    mean = sum(count * seconds for count, seconds in zip(atoms, alone, strict=True)) / sum(atoms)
    hand_over({"mixed": [seconds_per_atom(tuple(folders))], "alone": [mean], "tasks": [float(len(folders))]})


if __name__ == "__main__":
    main()
