"""Use of a loaded model: predictions for ASE atoms, calculators, and energies of all tasks."""

from __future__ import annotations

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
from hydrazero.models.inference.ase_structure import (
    all_conditions,
    check_all_conditions,
    structure_from_atoms,
    unread_condition,
)
from hydrazero.models.inference.extrapolation import (
    ExtrapolationWarning,
    ignored_conditions,
    undetermined_energy,
    warn_of_short_distances,
)
from hydrazero.models.inference.model_file import read_model
from hydrazero.models.inference.own_modes import own_modes
from hydrazero.models.inference.short_distances import ShortDistances
from hydrazero.models.inference.user_warnings import warn_user
from hydrazero.models.task_facts import NONE, TaskFacts
from hydrazero.shards.conditions import condition_named
from hydrazero.shards.errors import ConfigError, ModelFileError, StructureError, did_you_mean
from hydrazero.shards.graphs.graph import BatchShape, GraphBatch, GraphSample, collate, graph_sample, shape_holding
from hydrazero.shards.stream.packing import Packer, fits
from hydrazero.shards.structure import Structure

if TYPE_CHECKING:
    from hydrazero.models.inference.ase_calculator import HydrazeroCalculator
    from hydrazero.models.inference.torch_sim_model import TorchSimModel
    from hydrazero.models.ops.compiled import CompiledModel

STRUCTURES_AT_ONCE = 512
"""Number of structures whose neighbour lists are in memory at a time."""
DEFAULT_SHAPE = BatchShape(structures=64, atoms=2048, slots=32768)
"""Shape of a batch if there are enough structures to fill it."""


class Potential:
    """A model with the methods that apply it to structures."""

    def __init__(self, model: AtomisticModel, device: torch.device | str = "cpu") -> None:
        self.device = _available(device)
        self.model = model.to(self.device).eval()
        self._short_distances: ShortDistances | None = None
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks for which the model has heads."""
        return [task.name for task in self.model.tasks]

    @property
    def cutoff(self) -> float:
        """Distance up to which atoms are neighbours, Å."""
        return self.model.settings.encoder.cutoff

    @property
    def has_spread(self) -> bool:
        """Whether heads are ensembles, whose spread estimates the uncertainty of an energy."""
        return self.model.settings.ensemble > 1

    def task_index(self, name: str) -> int:
        """Return the index of a task; raise ModelFileError if the model has no such task."""
        if name not in self.tasks:
            raise ModelFileError(f"the model has no task '{name}'{did_you_mean(name, self.tasks)}.")
        return self.tasks.index(name)

    def facts(self, task: str) -> TaskFacts:
        """Return the facts of a task; raise ModelFileError if the model has no such task."""
        return self.model.tasks[self.task_index(task)]

    def why_not(self, structure: Structure, task: str) -> str | None:
        """Return why a task does not support a structure, None if it does.

        The structure may hold elements that are not in the training data, or lack a multiplicity that all training
        structures state. The text continues a sentence that begins with the name of the structure.
        """
        facts = self.facts(task)
        unseen = {chemical_symbols[int(z)] for z in np.unique(structure.numbers)} - set(facts.elements)
        if unseen:
            return f"holds {', '.join(sorted(unseen))}, which task '{task}' was not trained on"
        if facts.charge_spin and facts.multiplicity_known and not structure.multiplicity:
            lowest = 1 + (int(structure.numbers.astype(np.int64).sum()) - structure.charge) % 2
            return (
                f"does not state its spin multiplicity (atoms.info['multiplicity'], {lowest} or more for its number of "
                f"electrons), as every training structure of task '{task}' does"
            )
        return None

    def why_none(self, structure: Structure, tasks: Sequence[str]) -> str | None:
        """Return why none of the tasks supports a structure, in the words of `why_not`; None if one of them does."""
        reasons = [reason for task in tasks if (reason := self.why_not(structure, task)) is not None]
        if len(reasons) < len(tasks):
            return None
        held = {chemical_symbols[int(z)] for z in np.unique(structure.numbers)}
        if len(tasks) > 1 and (unseen := held - set().union(*(self.facts(task).elements for task in tasks))):
            return f"holds {', '.join(sorted(unseen))}, which none of the tasks {', '.join(tasks)} was trained on"
        return ", and ".join(reasons)

    def batches(
        self, samples: Iterable[GraphSample], shape: BatchShape
    ) -> Iterator[tuple[list[GraphSample], GraphBatch]]:
        """Pack samples into batches of a shape; yield the samples of each batch, and the batch on the model's device.

        A sample that does not fit into `shape` gets a batch of its own shape.
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

    @own_modes()
    def predict(
        self, structures: Atoms | Sequence[Atoms], tasks: str | Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Predict with the heads of `tasks`, by default all; return a row per structure and task, in their order.

        One structure or one task need not be in a list. A row holds 'structure' (index), 'task', 'energy' eV,
        'energy_spread' eV (the standard deviation of an ensemble of heads), 'forces' [atoms, 3] eV/Å, 'stress' [3, 3]
        eV/Å³ (for periodic structures whose cell has three vectors), each None where the task has none,
        'reference_energy' eV (the sum of the reference energies of all atoms), and 'targets', the task's other
        quantities by name. Numbers are of type float, arrays of type float64. For each task, the first structure with a
        charge or spin that the task ignores gives an ExtrapolationWarning, and so do the first whose energy its data
        leaves arbitrary and the first with atoms closer than in its data. Raises StructureError for a structure that is
        not valid or that a task does not support, ModelFileError for a task that the model does not have.
        """
        names = names_of(self.tasks if tasks is None else tasks)
        indices = [self.task_index(name) for name in names]
        given = [structures] if isinstance(structures, Atoms) else structures
        converted = [self._converted(atoms, n, names) for n, atoms in enumerate(given)]
        self._check_supported(converted, [unread_condition(all_conditions(atoms)) for atoms in given], names)
        rows: list[dict[str, Any]] = [{} for _ in range(len(converted) * len(names))]
        short, said = self._short_distances_of(names), set[str]()
        for first in range(0, len(converted), STRUCTURES_AT_ONCE):
            found = [graph_sample(each, 0, self.cutoff) for each in converted[first : first + STRUCTURES_AT_ONCE]]
            warn_of_short_distances(short, found, said)
            samples = [
                replace(sample, task=task, origin=(n, place))
                for n, sample in enumerate(found, first)
                for place, task in enumerate(indices)
            ]
            for packed, batch in self.batches(samples, shape_for(samples)):
                for sample, row in zip(packed, self.rows(packed, batch), strict=True):
                    n, place = sample.origin
                    rows[n * len(names) + place] = {"structure": n, "task": names[place], **row}
        return rows

    @own_modes()
    def rows(self, packed: Sequence[GraphSample], batch: GraphBatch) -> Iterator[dict[str, Any]]:
        """Predict each sample of a batch with the head of its task; yield rows as in `predict`.

        The rows lack 'structure' and 'task'.
        """
        return self.rows_of(packed, self.model(batch))

    def rows_of(self, packed: Sequence[GraphSample], predictions: Predictions) -> Iterator[dict[str, Any]]:
        """Yield the rows of samples, as `rows` does, from the predictions of their batch."""
        energy = predictions.energy.detach().cpu().numpy()
        spread = predictions.spread.detach().cpu().numpy().astype(np.float64)
        forces = predictions.forces.detach().cpu().numpy().astype(np.float64)
        stress = predictions.stress.detach().cpu().numpy().astype(np.float64)
        reference = predictions.reference.cpu().numpy()
        targets = {name: value.detach().cpu().numpy().astype(float) for name, value in predictions.targets.items()}
        first = 0
        for number, sample in enumerate(packed):
            atoms = slice(first, first + len(sample.structure))
            first = atoms.stop
            facts = self.model.tasks[sample.task]
            yield {
                "energy": float(energy[number]) if facts.has_energy else None,
                "reference_energy": float(reference[number]),
                "energy_spread": float(spread[number]) if facts.has_energy and self.has_spread else None,
                "forces": forces[atoms].copy() if facts.forces != NONE else None,
                "stress": stress[number].copy() if sample.structure.volume and facts.stress != NONE else None,
                "targets": {
                    name: targets[name][atoms].copy() if target.of == "atom" else _plain(targets[name][number])
                    for name, target in facts.targets.items()
                },
            }

    def _converted(self, atoms: Atoms, number: int, tasks: Sequence[str]) -> Structure:
        """Return the structure of ASE atoms; errors name its number."""
        name = f"structure {number}"
        if not isinstance(atoms, Atoms):
            raise StructureError("unreadable", f"{name} is of type {type(atoms).__name__}, not ase.Atoms.")
        try:
            if any(self.facts(task).charge_spin for task in tasks):
                check_all_conditions(atoms)
            return structure_from_atoms(atoms, name)
        except StructureError as error:
            raise StructureError(error.reason, f"{name}: {error}.") from error

    def _check_supported(
        self, structures: Sequence[Structure], unread: Sequence[str | None], tasks: Sequence[str]
    ) -> None:
        """Raise StructureError, which gives the reason, unless all tasks support all structures.

        Warn of the first structure whose charge or spin a task ignores, and of the first whose energy is arbitrary.
        `unread` says for each structure which charge or spin stands under a name that is not read.
        """
        for structure in structures:
            for task in tasks:
                if (reason := self.why_not(structure, task)) is not None:
                    raise StructureError(
                        "unseen", f"{structure.source_id} {reason}; leave the structure out or choose another task."
                    )
        for facts in map(self.facts, tasks):
            ignored = (
                ignored_conditions(facts, structure, structure.source_id, other)
                for structure, other in zip(structures, unread, strict=True)
            )
            arbitrary = (undetermined_energy(facts, each.numbers, each.source_id) for each in structures)
            for text in (next(filter(None, ignored), None), next(filter(None, arbitrary), None)):
                if text is not None:
                    warn_user(f"{text}.", ExtrapolationWarning)

    def _short_distances_of(self, tasks: Sequence[str]) -> ShortDistances:
        """Return the search for atoms that are too close for tasks; that of the last tasks is kept."""
        facts, kept = [self.facts(task) for task in tasks], self._short_distances
        if kept is None or [*map(id, kept.tasks)] != [*map(id, facts)]:
            kept = self._short_distances = ShortDistances(facts, self.cutoff)
        return kept

    @own_modes()
    def member_energies(self, batch: GraphBatch) -> NDArray[np.float64]:
        """Return the energies of a batch by the heads of all tasks in one pass: [structures, tasks, members] eV."""
        return self.model.members_of_all_tasks(batch).cpu().numpy()

    def calculator(
        self,
        task: str | None = None,
        *,
        others: str | Sequence[str] = (),
        skin: float = 0.3,
        compile: bool = False,
        **unknown: Any,
    ) -> HydrazeroCalculator:
        """Return an ASE calculator of one task; its options are those of `HydrazeroCalculator`.

        Raises ModelFileError without a task, or for a charge, which belongs to the structure.
        """
        from hydrazero.models.inference.ase_calculator import HydrazeroCalculator

        for name in unknown:
            if (kind := condition_named(name)) is not None:
                raise ModelFileError(
                    f"a calculator takes no {name}: give that of each structure as atoms.info['{kind}']."
                )
            raise TypeError(f"calculator() has no argument '{name}'")
        if task is None:
            raise ModelFileError(f"name the task of the calculator as task='...'; the model has {_quoted(self.tasks)}.")
        return HydrazeroCalculator(self, task, others=others, skin=skin, compile=compile)

    def torch_sim(
        self,
        task: str,
        dtype: torch.dtype = torch.float64,
        *,
        charge: int | None = None,
        multiplicity: int | None = None,
    ) -> TorchSimModel:
        """Return a torch-sim model of one task; its options are those of `TorchSimModel`.

        Raises SourceError if torch-sim is not installed.
        """
        from hydrazero.models.inference.torch_sim_model import TorchSimModel

        return TorchSimModel(self, task, dtype=dtype, charge=charge, multiplicity=multiplicity)

    def compiled(self) -> CompiledModel:
        """Return the model as compiled graphs that use the C++ kernels; warn if these cannot be built."""
        from hydrazero.models.ops.compiled import CompiledModel, sharing_weights, use_kernels

        model = sharing_weights(self.model)  # which chooses its kernels independently
        if (reason := use_kernels(model)) is not None:
            warn_user(f"compiled steps run without the C++ kernels, and are slower: {reason}.")
        return CompiledModel(model)


def names_of(tasks: str | Sequence[str]) -> list[str]:
    """Return the names of tasks as a list, one for a single name."""
    return [tasks] if isinstance(tasks, str) else list(tasks)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _available(device: torch.device | str) -> torch.device:
    """Return a device; raise ConfigError if it cannot be used here."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA raises AssertionError
        raise ConfigError(f"device '{device}' is not available here; use device='cpu'.") from error


def _plain(value: NDArray[np.float64]) -> float | NDArray[np.float64]:
    """Return a value of a structure as a number, or as an array of its own if it is a vector."""
    return float(value) if value.ndim == 0 else value.copy()


def shape_for(samples: Sequence[GraphSample]) -> BatchShape:
    """Return the default batch shape, or the smallest one that holds the samples if they are few."""
    tight = shape_holding(samples)
    return BatchShape(
        structures=min(DEFAULT_SHAPE.structures, tight.structures),
        atoms=min(DEFAULT_SHAPE.atoms, tight.atoms),
        slots=min(DEFAULT_SHAPE.slots, tight.slots),
    )


def load_model(path: Path | str, device: torch.device | str = "cpu") -> Potential:
    """Load an exported model.

    Raises ModelFileError if the file is missing, damaged, of another format or written by a newer version, ConfigError
    if this machine has no such device.
    """
    with own_modes():  # weights made in inference mode could not be differentiated later
        return Potential(read_model(Path(path)), device)
