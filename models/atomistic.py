"""The model: shared encoder, stacked heads, forces and stress from the energy, references and scales per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor, nn

from hydrazero.models.embedding import AtomEmbedding
from hydrazero.models.encoder import AtomInputs, EncoderSettings
from hydrazero.models.encoders import make_encoder
from hydrazero.models.heads import StackedEnergyHead
from hydrazero.models.slots import Segments, Slots
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graph import GraphBatch
from hydrazero.shards.structure import MAX_ATOMIC_NUMBER


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What the model and its users need to know of a task."""

    name: str
    reference_energies: dict[str, float]
    """eV per atom of each element."""
    scale: float
    """Unit of the head's output: typical force in eV/Å, or residual energy per atom in eV for a task without forces."""
    elements: list[str]
    """Elements that the training split holds."""
    fidelity: str = ""
    """Method, as the manifest tells it."""
    has_forces: bool = True
    """Whether the training labels hold forces."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Everything that is needed to build a model."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    head_features: int = 64
    """Width of the hidden layer of each head."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the model gives for a batch of S structures, A atoms; padding holds zeros."""

    interaction: Tensor
    """eV, [S]: the energy without references, in the model's precision."""
    reference: Tensor
    """eV, [S] float64: sum of the task's reference energies."""
    forces: Tensor
    """eV/Å, [A, 3]: minus the exact gradient of the energy."""
    stress: Tensor
    """eV/Å³, [S, 3, 3]; zero where a structure is not periodic in three directions."""

    @property
    def energy(self) -> Tensor:
        """Total energy: eV, [S] float64."""
        return self.interaction.to(torch.float64) + self.reference


class AtomisticModel(nn.Module):
    """Encoder and stacked heads for tasks in a fixed order."""

    references: Tensor
    """eV, [tasks, 119] float64."""
    scales: Tensor
    """Unit of each head's output, [tasks] float64."""

    def __init__(self, settings: ModelSettings, tasks: Sequence[TaskFacts]) -> None:
        super().__init__()
        self.settings, self.tasks = settings, list(tasks)
        self.kernels = False
        self.embedding = AtomEmbedding(settings.encoder.features)
        self.encoder = make_encoder(settings.encoder)
        self.energy_head = StackedEnergyHead(len(self.tasks), settings.encoder.features, settings.head_features)
        references, scales = reference_table(self.tasks), torch.tensor([t.scale for t in self.tasks])
        # Not persistent: their one home is the list of facts, which checkpoints and exports carry.
        self.register_buffer("references", references, persistent=False)
        self.register_buffer("scales", scales.to(torch.float64), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> AtomisticModel:
        """Move with the model, but never let references and scales leave float64."""
        super()._apply(fn, recurse)
        self.references = reference_table(self.tasks).to(self.references.device)
        self.scales = torch.tensor([t.scale for t in self.tasks], dtype=torch.float64).to(self.scales.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.energy_head.bias_out.dtype

    def reference_energy(self, batch: GraphBatch, task: Tensor) -> Tensor:
        """Sum of the reference energies of each structure's atoms for its task [S]: eV, [S] float64."""
        return self._structures(batch).sum(self.references[task[batch.structure], batch.numbers])

    def _node_scalars(self, batch: GraphBatch, positions: Tensor, strain: Tensor) -> Tensor:
        slots = Slots(
            atoms=batch.numbers.shape[0],
            row_atom=batch.row_atom,
            neighbours=batch.neighbours,
            reverse=batch.reverse,
            mask=batch.slot_mask,
            kernels=self.kernels,
        )
        vectors = slots.pair_vectors(positions, batch.shifts)
        vectors = vectors + torch.bmm(vectors, slots.spread(self._structures(batch).spread(strain)))
        inputs = AtomInputs(numbers=batch.numbers, scalars=self.embedding(batch.numbers))
        return self.encoder(inputs, self.encoder.measure(slots, vectors)).scalars

    def _structures(self, batch: GraphBatch) -> Segments:
        return Segments(owner=batch.structure, count=batch.task.shape[0], kernels=self.kernels)

    def _sum_atoms(self, batch: GraphBatch, atomic: Tensor) -> Tensor:
        """Atomic energies [A, ...] -> structures [S, ...], padding left out."""
        mask = batch.atom_mask.view(-1, *[1] * (atomic.dim() - 1))
        return self._structures(batch).sum(atomic * mask)

    def forward(self, batch: GraphBatch) -> Predictions:
        """Energies, forces and stress of each structure by the head of its own task."""
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_(True)
            strain = positions.new_zeros(batch.task.shape[0], 3, 3).requires_grad_(True)
            scalars = self._node_scalars(batch, positions, strain)
            atomic = self.energy_head(scalars, batch.task[batch.structure])
            interaction = self._sum_atoms(batch, atomic) * self.scales.to(atomic.dtype)[batch.task]
            gradient, virial = torch.autograd.grad(
                interaction.sum(), (positions, strain), create_graph=self.training, retain_graph=self.training
            )
        stress = 0.5 * (virial + virial.transpose(1, 2)) / batch.volume.view(-1, 1, 1)
        interaction = interaction if self.training else interaction.detach()
        return Predictions(
            interaction=interaction,
            reference=self.reference_energy(batch, batch.task),
            forces=-gradient,
            stress=stress * batch.periodic.view(-1, 1, 1),
        )

    @torch.no_grad()
    def energies_of_all_tasks(self, batch: GraphBatch) -> Tensor:
        """Energies of each structure by every task's head, in one pass of the encoder: eV, [S, T] float64."""
        strain = batch.positions.new_zeros(batch.task.shape[0], 3, 3)
        atomic = self.energy_head.all_tasks(self._node_scalars(batch, batch.positions, strain))
        interaction = self._sum_atoms(batch, atomic).to(torch.float64) * self.scales
        references = [
            self.reference_energy(batch, torch.full_like(batch.task, index)) for index in range(len(self.tasks))
        ]
        return interaction + torch.stack(references, dim=1)

    def facts(self) -> dict[str, Any]:
        """Return settings and task facts as plain types, from which `model_from_facts` builds the model again."""
        return {"settings": asdict(self.settings), "tasks": [asdict(task) for task in self.tasks]}


def reference_table(tasks: Sequence[TaskFacts]) -> Tensor:
    """Reference energies [tasks, 119] float64, eV; 0 for elements that a task does not know."""
    table = torch.zeros(len(tasks), MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    for row, task in enumerate(tasks):
        for symbol, energy in task.reference_energies.items():
            table[row, atomic_numbers[symbol]] = energy
    return table


def known_elements(tasks: Sequence[TaskFacts]) -> Tensor:
    """Whether the task's training split holds the element: [tasks, 119] bool."""
    table = torch.zeros(len(tasks), MAX_ATOMIC_NUMBER + 1, dtype=torch.bool)
    for row, task in enumerate(tasks):
        table[row, [atomic_numbers[symbol] for symbol in task.elements]] = True
    return table


def model_from_facts(facts: dict[str, Any]) -> AtomisticModel:
    """Build an untrained model from what `AtomisticModel.facts` gave; raises ConfigError if a field is unknown."""
    try:
        settings = dict(facts["settings"])
        encoder = EncoderSettings(**settings.pop("encoder"))
        tasks = [TaskFacts(**task) for task in facts["tasks"]]
        return AtomisticModel(ModelSettings(encoder=encoder, **settings), tasks)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"the model's description lacks or misuses a field ({error}).") from error
