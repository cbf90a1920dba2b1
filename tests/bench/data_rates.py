"""Rates of data loading on one core: reading, neighbour lists and the complete pipeline, next to other packages."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import ase.db
import numpy as np
import torch
import webdataset
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.collections import g2
from bench_shards import write_bench_shards
from timing import hand_over
from vesin import NeighborList

from hydrazero.shards.graphs.graph import BatchShape, GraphBatch
from hydrazero.shards.graphs.neighbours import half_pairs, lay_out
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.stream.stream import StreamSettings, TrainStream
from hydrazero.shards.structure import Structure

BLOCK = 256
STRUCTURES = 32 * 256
CUTOFF = 5.0
SHAPES = {
    "molecules": BatchShape(structures=64, atoms=1024, slots=24_576),
    "metals": BatchShape(structures=64, atoms=1024, slots=49_152),
}


def labelled(numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, number: int) -> Structure:
    generator = np.random.default_rng(number)
    return Structure(
        numbers=numbers.astype(np.uint8),
        positions=positions,
        cell=cell,
        pbc=np.full(3, cell.any()),
        energy=float(generator.standard_normal()),
        forces=generator.standard_normal(positions.shape),
        source_id=f"made#{number}",
    )


def molecules() -> list[Structure]:
    """Return molecules of about 20 atoms: two molecules of the g2 set side by side, rattled."""
    generator = np.random.default_rng(0)
    parents = [g2[name] for name in g2.names if 8 <= len(g2[name]) <= 14]
    structures = []
    for number in range(STRUCTURES):
        one, two = (parents[int(generator.integers(len(parents)))] for _ in range(2))
        positions = np.concatenate([one.positions, two.positions + np.array([0.0, 0.0, 6.0])])
        positions += 0.05 * generator.standard_normal(positions.shape)
        structures.append(labelled(np.concatenate([one.numbers, two.numbers]), positions, np.zeros((3, 3)), number))
    return structures


def metals() -> list[Structure]:
    """Return rattled cells of 32 Cu atoms."""
    cell = bulk("Cu", cubic=True) * (2, 2, 2)
    generator = np.random.default_rng(1)
    return [
        labelled(cell.numbers, cell.positions + 0.1 * generator.standard_normal((32, 3)), cell.cell[:], number)
        for number in range(STRUCTURES)
    ]


def rate(run: Callable[[], int]) -> float:
    """Return the number that `run` returns, per second."""
    started = time.perf_counter()
    count = run()
    return count / (time.perf_counter() - started)


def decode_columns(folder: Path) -> int:
    """Read a tar file, check its checksum and decode its columns; return the number of structures."""
    reader = BlockReader(folder, "train")
    return sum(len(reader.read(number)) for number in range(len(reader)))


def decode_structures(folder: Path) -> int:
    """Decode columns, and make each structure an object, as formats with one record per structure do."""
    reader = BlockReader(folder, "train")
    blocks = (reader.read(number) for number in range(len(reader)))
    return sum(1 for block in blocks for row in range(len(block)) if len(block.structure(row)))


def pipeline(stream: Iterator[GraphBatch], batches: int) -> int:
    """Take batches from a stream as fast as it makes them; return the number of structures."""
    return sum(int(batch.structure_mask.sum()) for batch in islice(stream, batches))


def pipeline_rate(settings: StreamSettings) -> float:
    """Return structures/s of a running worker, measured after its prefetched batches have been taken."""
    stream = iter(TrainStream(settings, 0, 1))
    pipeline(stream, 12)
    return rate(lambda: pipeline(stream, 80))


def write_npz_samples(path: Path, structures: list[Structure]) -> None:
    """Write structures in the usual layout of webdataset, one npz file per structure."""
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for number, s in enumerate(structures):
            buffer = io.BytesIO()
            np.savez(
                buffer,
                numbers=s.numbers,
                positions=s.positions.astype(np.float32),
                cell=s.cell,
                pbc=s.pbc,
                energy=np.float64(s.energy or 0.0),
                forces=np.zeros(1) if s.forces is None else s.forces.astype(np.float32),
            )
            tar.write({"__key__": f"{number:08d}", "structure.npz": buffer.getvalue()})


def read_npz_samples(path: Path) -> int:
    dataset = webdataset.WebDataset(str(path), shardshuffle=False).decode()
    return sum(1 for sample in dataset if dict(sample["structure.npz"])["positions"].size)


def write_aselmdb(path: Path, structures: list[Structure]) -> None:
    with ase.db.connect(str(path), type="aselmdb") as database:
        for s in structures:
            atoms = Atoms(numbers=s.numbers, positions=s.positions, cell=s.cell, pbc=s.pbc)
            atoms.calc = SinglePointCalculator(atoms, energy=s.energy, forces=s.forces)
            database.write(atoms)


def read_aselmdb(path: Path) -> int:
    with ase.db.connect(str(path), type="aselmdb", readonly=True) as database:
        return sum(1 for row in database.select() if len(row.toatoms()))


def edges_over_vesin(structures: list[Structure]) -> float:
    """Return the time of our neighbour lists, in slots for batches of 32, divided by that of vesin alone.

    Both are timed alternately.
    """
    bare = NeighborList(cutoff=CUTOFF, full_list=True, n_threads=1)
    ours, theirs = [], []
    for first in range(0, 1024, 32):
        part = structures[first : first + 32]
        started = time.perf_counter()
        lay_out([half_pairs(s.positions, s.cell, s.pbc, CUTOFF) for s in part])
        middle = time.perf_counter()
        for s in part:
            bare.compute(points=s.positions, box=s.cell, periodic=bool(s.pbc.any()), quantities="ijS")
        ours.append(middle - started)
        theirs.append(time.perf_counter() - middle)
    return float(np.median(ours) / np.median(theirs))


def worker_memory(folders: list[str]) -> float:
    """Return the peak memory of a separate process that reads the folders, MB, beyond its imports."""
    code = f"import data_rates; data_rates.print_worker_memory({folders!r})"
    here = Path(__file__).parent
    return float(subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, check=True).stdout)


def resident(kind: str) -> float:
    """Return the memory of this process, MB: 'VmRSS' is the current value, 'VmHWM' the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(kind + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def print_worker_memory(folders: list[str]) -> None:
    """Print the memory of this process for `worker_memory`."""
    before = resident("VmRSS")
    settings = StreamSettings(folders=tuple(folders), cutoff=CUTOFF, shape=SHAPES["metals"], workers=0)
    pipeline(iter(TrainStream(settings, 0, 1)), 200)
    sys.stdout.write(f"{resident('VmHWM') - before}\n")


def main() -> None:
    torch.set_num_threads(1)
    measured: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        measured.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = {"molecules": molecules(), "metals": metals()}
        streams = {}
        for kind, structures in made.items():
            write_bench_shards(root / kind, structures, BLOCK)
            # One worker process has a core to itself; this process only receives its batches.
            streams[kind] = StreamSettings(folders=(str(root / kind),), cutoff=CUTOFF, shape=SHAPES[kind], workers=1)
        few = made["molecules"][:2048]
        write_bench_shards(root / "few", few, BLOCK)
        write_npz_samples(root / "npz.tar", few)
        write_aselmdb(root / "few.aselmdb", few)
        for _ in range(5):
            note("decode_columns", rate(lambda: decode_columns(root / "molecules")))
            for kind, settings in streams.items():
                note(f"pipeline_{kind}", pipeline_rate(settings))
            note("edges_molecules", edges_over_vesin(made["molecules"]))
            note("edges_metals", edges_over_vesin(made["metals"]))
            note("structures", rate(lambda: decode_structures(root / "few")))
            note("npz", rate(lambda: read_npz_samples(root / "npz.tar")))
            note("aselmdb", rate(lambda: read_aselmdb(root / "few.aselmdb")))
        note("worker_memory", worker_memory([str(root / "molecules"), str(root / "metals")]))
    hand_over(measured)


if __name__ == "__main__":
    main()
