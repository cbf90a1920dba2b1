"""A loaded model in use: predictions for ASE atoms, calculators, energies of every task."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from hydrazero.models.atomistic import AtomisticModel, Predictions
from hydrazero.models.inference.model_file import read_model
from hydrazero.models.task_facts import NONE, TaskFacts
from hydrazero.shards.errors import ModelFileError, StructureError, did_you_mean
from hydrazero.shards.graphs.graph import BatchShape, GraphBatch, GraphSample, collate, graph_sample, shape_holding
from hydrazero.shards.stream.packing import Packer, fits
from hydrazero.shards.structure import Structure, check_structure

if TYPE_CHECKING:
    from hydrazero.models.inference.ase_calculator import HydrazeroCalculator
    from hydrazero.models.inference.torch_sim_model import TorchSimModel
    from hydrazero.models.ops.compiled import CompiledModel

CONDITIONS = ("charge", "multiplicity")
"""Keys of `atoms.info` that predictions may depend on."""

AT_ONCE = 512
"""Structures whose neighbours are held at a time."""
DEFAULT_SHAPE = BatchShape(structures=64, atoms=2048, slots=32768)


def structure_from_atoms(atoms: Atoms, source_id: str = "") -> Structure:
    """Take geometry, charge and multiplicity (`atoms.info`) of ASE atoms, no labels; raises StructureError."""
    structure = Structure(
        numbers=atoms.numbers.astype(np.uint8),
        positions=np.asarray(atoms.positions, dtype=np.float64),
        cell=np.asarray(atoms.cell[:], dtype=np.float64),
        pbc=np.asarray(atoms.pbc, dtype=bool),
        charge=_whole(atoms, "charge"),
        multiplicity=_whole(atoms, "multiplicity"),
        source_id=source_id,
    )
    check_structure(structure)
    return structure


def _whole(atoms: Atoms, key: str) -> int:
    """Return a whole number of `atoms.info`, 0 if it is not there; raises StructureError for anything else."""
    value = atoms.info.get(key, 0)
    try:
        if int(value) == value:
            return int(value)
    except (TypeError, ValueError):
        pass
    raise StructureError("condition", f"atoms.info['{key}'] is {value!r}; it must be a whole number.")


class Potential:
    """A model and everything that is needed to apply it to structures."""

    def __init__(self, model: AtomisticModel, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that the model has heads for."""
        return [task.name for task in self.model.tasks]

    @property
    def cutoff(self) -> float:
        """Å."""
        return self.model.settings.encoder.cutoff

    @property
    def has_spread(self) -> bool:
        """Whether heads are ensembles, whose spread tells how sure an energy is."""
        return self.model.settings.ensemble > 1

    def task_index(self, name: str) -> int:
        """Place of a task; raises ModelFileError if the model has no such head."""
        if name not in self.tasks:
            raise ModelFileError(f"the model has no task '{name}'{did_you_mean(name, self.tasks)}.")
        return self.tasks.index(name)

    def facts(self, task: str) -> TaskFacts:
        """What is known of a task; raises ModelFileError if the model has no such head."""
        return self.model.tasks[self.task_index(task)]

    def why_not(self, structure: Structure, task: str) -> str | None:
        """Return why a task cannot take a structure, in words that follow its name; None if it can.

        It may hold elements that the training data did not, or not say what all training structures say.
        """
        facts = self.facts(task)
        unseen = {chemical_symbols[int(z)] for z in np.unique(structure.numbers)} - set(facts.elements)
        if unseen:
            return f"holds {', '.join(sorted(unseen))}, which task '{task}' was not trained on"
        if facts.charge_spin and facts.multiplicity_known and not structure.multiplicity:
            lowest = 1 + (int(structure.numbers.astype(np.int64).sum()) - structure.charge) % 2
            return (
                f"does not say its spin multiplicity (atoms.info['multiplicity'], {lowest} or more with its "
                f"electrons), which every training structure of task '{task}' does"
            )
        return None

    def batches(
        self, samples: Iterable[GraphSample], shape: BatchShape
    ) -> Iterator[tuple[list[GraphSample], GraphBatch]]:
        """Pack samples and give them with their batches, on the model's device.

        A sample that is larger than `shape` gets a batch of its own size.
        """
        packer = Packer(shape)
        for sample in samples:
            if not fits(sample, shape):
                yield self._batch([sample], shape_holding([sample]))
                continue
            packer.add(sample)
            while (packed := packer.pop_full()) is not None:
                yield self._batch(packed, shape)
        while (packed := packer.pop_any()) is not None:
            yield self._batch(packed, shape)

    def _batch(self, packed: list[GraphSample], shape: BatchShape) -> tuple[list[GraphSample], GraphBatch]:
        return packed, collate(packed, shape, self.model.dtype).to(self.device)

    def predict(self, structures: Sequence[Atoms], tasks: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Predict with each of the tasks' heads (all by default): a row per structure and task, in their order.

        A row holds 'structure' (index), 'task', 'energy' eV, 'energy_spread' eV (the standard deviation of an ensemble
        of heads), 'forces' eV/Å [atoms, 3], 'stress' eV/Å³ [3, 3] (for cells periodic in three directions), each None
        where the task has none, and 'targets', the task's other quantities by name. Raises StructureError for a
        structure that cannot be used or an element that the task has not seen, ModelFileError for a task that the model
        does not have.
        """
        names = self.tasks if tasks is None else list(tasks)
        indices = [self.task_index(name) for name in names]
        converted = [structure_from_atoms(atoms, f"structure {n}") for n, atoms in enumerate(structures)]
        self._refuse_strange(converted, names)
        rows: list[dict[str, Any]] = [{} for _ in range(len(converted) * len(names))]
        for first in range(0, len(converted), AT_ONCE):
            samples = []
            for n, structure in enumerate(converted[first : first + AT_ONCE], first):
                of_any = graph_sample(structure, 0, self.cutoff)
                samples += [replace(of_any, task=task, origin=(n, place)) for place, task in enumerate(indices)]
            for packed, batch in self.batches(samples, shape_for(samples)):
                for sample, row in zip(packed, self.rows(packed, batch), strict=True):
                    n, place = sample.origin
                    rows[n * len(names) + place] = {"structure": n, "task": names[place], **row}
        return rows

    def rows(self, packed: Sequence[GraphSample], batch: GraphBatch) -> Iterator[dict[str, Any]]:
        """Predict a batch, each sample by the head of its task: rows as those of `predict`, with 'reference_energy'."""
        return self.rows_of(packed, self.model(batch))

    def rows_of(self, packed: Sequence[GraphSample], predictions: Predictions) -> Iterator[dict[str, Any]]:
        """Take predictions of a batch apart, as `rows` gives them."""
        energy = predictions.energy.detach().cpu().numpy()
        spread = predictions.spread.detach().cpu().numpy().astype(np.float64)
        forces = predictions.forces.detach().cpu().numpy().astype(np.float64)
        stress = predictions.stress.detach().cpu().numpy().astype(np.float64)
        reference = predictions.reference.cpu().numpy()
        targets = {name: value.detach().cpu().numpy() for name, value in predictions.targets.items()}
        first = 0
        for number, sample in enumerate(packed):
            atoms = slice(first, first + len(sample.structure))
            first = atoms.stop
            facts = self.model.tasks[sample.task]
            periodic = bool(sample.structure.pbc.all())
            yield {
                "energy": float(energy[number]) if facts.has_energy else None,
                "reference_energy": float(reference[number]),
                "energy_spread": float(spread[number]) if facts.has_energy and self.has_spread else None,
                "forces": forces[atoms].copy() if facts.forces != NONE else None,
                "stress": stress[number].copy() if periodic and facts.stress != NONE else None,
                "targets": {
                    name: targets[name][atoms].copy() if target.of == "atom" else targets[name][number].copy()
                    for name, target in facts.targets.items()
                },
            }

    def _refuse_strange(self, structures: Sequence[Structure], tasks: Sequence[str]) -> None:
        for structure in structures:
            for task in tasks:
                if (reason := self.why_not(structure, task)) is not None:
                    raise StructureError(
                        "unseen", f"{structure.source_id} {reason}; leave the structure out or choose another task."
                    )

    def member_energies(self, batch: GraphBatch) -> NDArray[np.float64]:
        """Energies of a batch by every task's head in one pass: eV, [structures, tasks, members of the ensembles]."""
        return self.model.members_of_all_tasks(batch).cpu().numpy()

    def calculator(
        self, task: str, *, others: Sequence[str] = (), skin: float = 0.3, compile: bool = False
    ) -> HydrazeroCalculator:
        """Return an ASE calculator of one task; see `HydrazeroCalculator`."""
        from hydrazero.models.inference.ase_calculator import HydrazeroCalculator

        return HydrazeroCalculator(self, task, others=others, skin=skin, compile=compile)

    def torch_sim(self, task: str, dtype: torch.dtype = torch.float64) -> TorchSimModel:
        """Return a torch-sim model of one task, for states of `dtype`; raises SourceError if it is not installed."""
        from hydrazero.models.inference.torch_sim_model import TorchSimModel

        return TorchSimModel(self, task, dtype=dtype)

    def compiled(self) -> CompiledModel:
        """Return the model as compiled graphs, with the C++ kernels; warns where those cannot be had."""
        from hydrazero.models.ops.compiled import CompiledModel, use_kernels

        model = copy.copy(self.model)  # the same weights, and a choice of kernels of its own
        if (reason := use_kernels(model)) is not None:
            warnings.warn(f"compiled steps do without the C++ kernels, and are slower: {reason}.", stacklevel=2)
        return CompiledModel(model)


def shape_for(samples: Sequence[GraphSample]) -> BatchShape:
    """Return the default batch size, or one that just holds the samples where they are few."""
    tight = shape_holding(samples)
    return BatchShape(
        structures=min(DEFAULT_SHAPE.structures, tight.structures),
        atoms=min(DEFAULT_SHAPE.atoms, tight.atoms),
        slots=min(DEFAULT_SHAPE.slots, tight.slots),
    )


def load_model(path: Path | str, device: torch.device | str = "cpu") -> Potential:
    """Open an exported model; raises ModelFileError if the file is missing, not ours, newer, or damaged."""
    return Potential(read_model(Path(path)), device)
