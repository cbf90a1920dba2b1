"""Structures, batches and small models that several tests use."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule

from hydrazero.models.atomistic import AtomisticModel, Predictions
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.task_facts import TaskFacts
from hydrazero.shards.graphs.graph import BatchShape, GraphBatch, collate, graph_sample, shape_holding
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.structure import Structure

CUTOFF = 4.0


def to_structure(atoms: Atoms, source_id: str = "", **labels: object) -> Structure:
    return Structure(
        numbers=atoms.numbers.astype(np.uint8),
        positions=np.array(atoms.positions, dtype=np.float64),
        cell=np.array(atoms.cell[:], dtype=np.float64),
        pbc=np.array(atoms.pbc, dtype=bool),
        source_id=source_id,
        **labels,  # type: ignore[arg-type]
    )


def rattled_molecule(name: str = "CH3CH2OH", seed: int = 0, amplitude: float = 0.1) -> Atoms:
    atoms = molecule(name)
    atoms.rattle(amplitude, seed=seed)
    return atoms


def rattled_crystal(seed: int = 0) -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.rattle(0.1, seed=seed)
    skew = np.eye(3) + 0.05 * np.random.default_rng(seed).standard_normal((3, 3))
    atoms.set_cell(atoms.cell[:] @ skew, scale_atoms=True)
    return atoms


def batch_of(
    structures: list[Structure],
    tasks: list[int] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    extra: tuple[int, int, int] = (0, 0, 0),
    cutoff: float = CUTOFF,
) -> GraphBatch:
    """Return the smallest batch of the structures, plus padding of `extra` structures, atoms and rows of slots."""
    samples = [
        graph_sample(structure, 0 if tasks is None else tasks[n], cutoff) for n, structure in enumerate(structures)
    ]
    tight = shape_holding(samples)
    shape = BatchShape(
        structures=tight.structures + extra[0], atoms=tight.atoms + extra[1], slots=tight.slots + extra[2] * ROW_SLOTS
    )
    return collate(samples, shape, dtype)


def facts(name: str, **values: object) -> TaskFacts:
    defaults: dict[str, object] = {
        "name": name,
        "reference_energies": {"H": -13.5, "C": -1030.0, "O": -2040.0, "Na": -4400.0, "Cl": -12500.0},
        "scale": 1.3,
        "elements": ["C", "Cl", "H", "Na", "O"],
    }
    return TaskFacts(**{**defaults, **values})  # type: ignore[arg-type]


def small_model(
    encoder: str = "painn", tasks: int = 2, dtype: torch.dtype = torch.float64, **settings: object
) -> AtomisticModel:
    torch.manual_seed(5)
    values: dict[str, object] = {"features": 16, "layers": 2, "radial_functions": 8, "cutoff": CUTOFF, **settings}
    model = AtomisticModel(
        ModelSettings(encoder=EncoderSettings(encoder=encoder, **values), head_features=8),  # type: ignore[arg-type]
        [facts(f"task{n}", scale=1.0 + n) for n in range(tasks)],
    )
    return model.to(dtype).eval()


def predict(model: AtomisticModel, atoms: Atoms | list[Atoms], tasks: list[int] | None = None) -> Predictions:
    many = atoms if isinstance(atoms, list) else [atoms]
    return model(batch_of([to_structure(a) for a in many], tasks, dtype=model.dtype))
