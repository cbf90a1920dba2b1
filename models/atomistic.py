"""The model: a shared encoder, stacked heads, forces and stress, and reference energies per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hydrazero.models.embedding import AtomConditions, AtomEmbedding
from hydrazero.models.encoders import ENCODERS, make_encoder
from hydrazero.models.encoders.base import (
    SMALLEST_WIDTH,
    AtomInputs,
    NodeFeatures,
    PairGeometry,
)
from hydrazero.models.heads.heads import ScalarHead, VectorHead, VirialHead
from hydrazero.models.heads.target_heads import TargetHeads
from hydrazero.models.heads.task_linear import TaskRows, probed
from hydrazero.models.model_settings import ModelSettings, check_model
from hydrazero.models.ops.exact import exact_matmul
from hydrazero.models.ops.slots import Segments, slots_of
from hydrazero.models.repulsion import ZieglerBiersackLittmark
from hydrazero.models.task_facts import CONSERVATIVE, DIRECT, TaskFacts, reference_table, task_facts_from
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.shards.settings_parser import parse_settings


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions for a batch of S structures and A atoms; zero for padding."""

    interaction: Tensor
    """Energy without reference energies in eV, [S], in the precision of the model."""
    reference: Tensor
    """Sum of the reference energies of the task in eV, [S] float64."""
    forces: Tensor
    """Forces in eV/Å, [A, 3]: minus the exact gradient of the energy, or from a direct head if the task has one."""
    stress: Tensor
    """Stress in eV/Å³, [S, 3, 3]; zero where a structure has no volume (`Structure.volume`)."""
    spread: Tensor
    """Standard deviation of the energies of the ensemble in eV, [S]; 0 without an ensemble."""
    targets: dict[str, Tensor] = field(default_factory=dict)
    """Other quantities by name, [S], [S, 3], [A] or [A, 3]; meaningless for tasks without the label."""

    @property
    def energy(self) -> Tensor:
        """Total energy in eV, [S] float64."""
        return self.interaction.to(torch.float64) + self.reference


class AtomisticModel(nn.Module):
    """An encoder and stacked heads for tasks in a fixed order."""

    references: Tensor
    """Reference energies in eV by task and atomic number, [tasks, 119] float64."""
    scales: Tensor
    """Unit of each energy head's output, [tasks] float64."""

    def __init__(self, settings: ModelSettings, tasks: Sequence[TaskFacts]) -> None:
        """Create a model with first weights; raise ConfigError if settings and tasks are not compatible."""
        super().__init__()
        check_model(settings, tasks)
        self.settings, self.tasks = settings, list(tasks)
        self.kernels = False
        """Whether sums over neighbours use the C++ kernels; see `models.ops.compiled.use_kernels`."""
        self.autocast: torch.dtype | None = None
        """Lower precision of the encoder's matrix products; geometry, sums, heads and energies are in `dtype`."""
        features = settings.encoder.features
        size = settings.head_size(len(self.tasks))
        self.embedding = AtomEmbedding(
            features, [task.charge_spin for task in self.tasks], of_tasks=settings.task_embedding
        )
        self.encoder = make_encoder(settings.encoder)
        self.energy_head = ScalarHead(size, settings.ensemble)
        self.forces_head = VectorHead(size) if self._any("forces", DIRECT) else None
        self.stress_head: VirialHead | None = None
        if self._any("stress", DIRECT):
            self.stress_head = VirialHead(size, settings.encoder.radial_functions + 1)
        self.targets = TargetHeads(self.tasks, size, settings.attention_targets)
        self.repulsion = ZieglerBiersackLittmark(settings.encoder.cutoff) if settings.repulsion == "zbl" else None
        self.register_buffer("references", torch.empty(0), persistent=False)
        self.register_buffer("scales", torch.empty(0), persistent=False)
        self._fill_tables(None)

    def _fill_tables(self, device: torch.device | None) -> None:
        # Not persistent: they are stored once, in the facts of the tasks, which checkpoints and exports contain.
        self.references = reference_table(self.tasks).to(device)
        self.scales = torch.tensor([task.scale for task in self.tasks], dtype=torch.float64, device=device)

    def _any(self, way: str, value: str) -> bool:
        return any(getattr(task, way) == value for task in self.tasks)

    def _apply(self, fn: Any, recurse: bool = True) -> AtomisticModel:
        """Move or convert the model; reference energies and scales always stay in float64."""
        super()._apply(fn, recurse)
        self._fill_tables(self.scales.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Precision of geometry, heads and energies: that of the weights, but at least float32."""
        return torch.promote_types(self.energy_head.first.weight.dtype, torch.float32)

    def reference_energy(self, batch: GraphBatch, task: Tensor) -> Tensor:
        """Return the sum of the reference energies of each structure's atoms for a task [S], in eV, [S] float64."""
        return self._structures(batch).sum(self.references[task[batch.structure], batch.numbers])

    def _structures(self, batch: GraphBatch) -> Segments:
        return Segments(owner=batch.structure, count=batch.task.shape[0], kernels=self.kernels)

    def _rows(self, task: Tensor, batch: GraphBatch) -> TaskRows:
        return TaskRows(task=task[batch.structure], count=len(self.tasks), kernels=self.kernels)

    def _sum_atoms(self, batch: GraphBatch, atomic: Tensor) -> Tensor:
        """Return the sums [S, ...] of values of atoms [A, ...] over the atoms of each structure, without padding."""
        mask = batch.atom_mask.view(-1, *[1] * (atomic.dim() - 1))
        return self._structures(batch).sum(atomic * mask)

    def _encode(
        self, batch: GraphBatch, task: Tensor, positions: Tensor, strain: Tensor
    ) -> tuple[NodeFeatures, PairGeometry]:
        """Return node features and pair geometry, each structure encoded for a task [S]."""
        slots = slots_of(batch, kernels=self.kernels)
        vectors = slots.pair_vectors(positions, batch.shifts)
        vectors = vectors + exact_matmul(vectors, slots.spread(self._structures(batch).spread(strain)))
        conditions = AtomConditions(
            rows=self._rows(task, batch),
            charge=batch.charge[batch.structure],
            multiplicity=batch.multiplicity[batch.structure],
        )
        inputs = AtomInputs(numbers=batch.numbers, scalars=self.embedding(batch.numbers, conditions))
        pairs = self.encoder.measure(slots, vectors)
        device = positions.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            features = self.encoder(inputs, pairs)
        vectors_out = None if features.vectors is None else features.vectors.to(self.dtype)
        return NodeFeatures(scalars=features.scalars.to(self.dtype), vectors=vectors_out), pairs

    def forward(self, batch: GraphBatch, probe: Tensor | None = None) -> Predictions:
        """Return energies, forces, stress and targets of each structure by the heads of its own task.

        The gradient of a probe [tasks, F, F] is that of each task for the node scalars; see `probed`.
        """
        return self._predict(batch, probe)[0]

    def _predict(
        self, batch: GraphBatch, probe: Tensor | None = None
    ) -> tuple[Predictions, NodeFeatures, PairGeometry]:
        """Return predictions, node features and pair geometry."""
        conservative = self._any("forces", CONSERVATIVE) or self._any("stress", CONSERVATIVE)
        with torch.set_grad_enabled(torch.is_grad_enabled() or conservative):
            positions = batch.positions.detach().requires_grad_(conservative)
            strain = positions.new_zeros(batch.task.shape[0], 3, 3).requires_grad_(conservative)
            features, pairs = self._encode(batch, batch.task, positions, strain)
            rows = self._rows(batch.task, batch)
            if probe is not None:
                features = replace(features, scalars=probed(features.scalars, probe, rows))
            members = self._member_energies(batch, features.scalars, rows)
            interaction = members.mean(1)
            if self.repulsion is not None:
                interaction = interaction + self._sum_atoms(batch, self.repulsion(batch.numbers, pairs))
            forces, virial = torch.zeros_like(positions), torch.zeros_like(strain)
            if conservative:
                gradient, virial = torch.autograd.grad(
                    interaction.sum(), (positions, strain), create_graph=self.training, retain_graph=self.training
                )
                forces = -gradient
            spread = torch.zeros_like(interaction)
            if self.settings.ensemble > 1:
                # The loss of the spread must not change the encoder.
                spread = self._member_energies(batch, features.scalars.detach(), rows).std(1)
        if not self.training:
            features = NodeFeatures(
                scalars=features.scalars.detach(),
                vectors=None if features.vectors is None else features.vectors.detach(),
            )
            pairs = replace(pairs, radial=pairs.radial.detach(), directions=pairs.directions.detach())
        virial = 0.5 * (virial + virial.transpose(1, 2))
        forces, virial = self._direct(batch, rows, features, pairs, (forces, virial))
        predictions = Predictions(
            interaction=interaction if self.training else interaction.detach(),
            reference=self.reference_energy(batch, batch.task),
            forces=forces,
            stress=virial / batch.volume.view(-1, 1, 1) * batch.periodic.view(-1, 1, 1),
            spread=spread if self.training else spread.detach(),
            targets=self.targets(features, rows, self._structures(batch), batch.atom_mask),
        )
        return predictions, features, pairs

    def _member_energies(self, batch: GraphBatch, scalars: Tensor, rows: TaskRows) -> Tensor:
        """Return the energies by each of M members of the ensemble in eV, [S, M], from node scalars [A, F]."""
        atomic = self.energy_head(scalars, rows)
        return self._sum_atoms(batch, atomic) * self.scales.to(atomic.dtype)[batch.task].unsqueeze(1)

    def _direct(
        self,
        batch: GraphBatch,
        rows: TaskRows,
        features: NodeFeatures,
        pairs: PairGeometry,
        gradients: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return forces and virial, from direct heads for tasks that have them and from gradients for the others."""
        forces, virial = gradients
        if features.vectors is None:
            return forces, virial
        if self.forces_head is not None:
            scale = rows.pick(self.scales.to(forces.dtype)).unsqueeze(1)
            given = self.forces_head(features.scalars, features.vectors, rows) * scale
            given = given * batch.atom_mask.unsqueeze(1)
            forces = torch.where(self._by_way("forces", rows.task).unsqueeze(1), given, forces)
        if self.stress_head is not None:
            given = self._sum_atoms(batch, self.stress_head(features, rows, pairs))
            given = given * self.scales.to(virial.dtype)[batch.task].view(-1, 1, 1)
            virial = torch.where(self._by_way("stress", batch.task).view(-1, 1, 1), given, virial)
        return forces, virial

    def _by_way(self, way: str, task: Tensor) -> Tensor:
        """Return whether each task [N] has a direct head for 'forces' or 'stress', [N] bool."""
        direct = torch.tensor([getattr(facts, way) == DIRECT for facts in self.tasks], device=task.device)
        return direct[task]

    def energies_of_all_tasks(self, batch: GraphBatch) -> Tensor:
        """Return the energies of each structure by every task's head in eV, [S, T] float64.

        This takes one pass of the encoder, or one pass per task if the inputs of the encoder depend on the task.
        """
        return self.members_of_all_tasks(batch).mean(2)

    @torch.no_grad()
    def members_of_all_tasks(self, batch: GraphBatch) -> Tensor:
        """Return energies like `energies_of_all_tasks`, by each member of the ensembles, in eV, [S, T, M] float64."""
        strain = batch.positions.new_zeros(batch.task.shape[0], 3, 3)
        columns = []
        for index in range(len(self.tasks) if self.embedding.by_task else 1):
            task = torch.full_like(batch.task, index)
            column = self._members_by_task(batch, *self._encode(batch, task, batch.positions, strain))
            columns.append(column[:, index : index + 1] if self.embedding.by_task else column)
        return torch.cat(columns, dim=1)

    def members_and_forces(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """Return the result of `members_of_all_tasks`, and the forces by the structures' own tasks in eV/Å, [A, 3].

        Both come from one pass of the encoder if its inputs do not depend on the task.
        """
        predictions, features, pairs = self._predict(batch)
        if self.embedding.by_task:
            return self.members_of_all_tasks(batch), predictions.forces
        return self._members_by_task(batch, features, pairs), predictions.forces

    @torch.no_grad()
    def _members_by_task(self, batch: GraphBatch, features: NodeFeatures, pairs: PairGeometry) -> Tensor:
        """Return the energies by every task's head in eV, [S, T, M] float64, from the outputs of the encoder."""
        atomic = self.energy_head.all_tasks(features.scalars)
        energies = self._sum_atoms(batch, atomic).to(torch.float64) * self.scales.unsqueeze(1)
        if self.repulsion is not None:
            energies = energies + self._sum_atoms(batch, self.repulsion(batch.numbers, pairs)).view(-1, 1, 1)
        tasks = range(len(self.tasks))
        references = [self.reference_energy(batch, torch.full_like(batch.task, index)) for index in tasks]
        return energies + torch.stack(references, dim=1).unsqueeze(2)

    def facts(self) -> dict[str, Any]:
        """Return settings and task facts as plain types, from which `model_from_facts` builds the model again.

        With the encoder of another package, the name of that package is among them.
        """
        facts: dict[str, Any] = {"settings": self.settings.model_dump(), "tasks": [asdict(task) for task in self.tasks]}
        package = ENCODERS.package_of(self.settings.encoder.encoder)
        return facts if package is None else {**facts, "encoder_package": package.name}


def model_from_facts(facts: dict[str, Any]) -> AtomisticModel:
    """Build an untrained model from what `AtomisticModel.facts` returned.

    Raises ConfigError if a field is unknown, or if the encoder comes from a package that is not installed.
    """
    try:
        settings, encoder, package = facts["settings"], facts["settings"]["encoder"], facts.get("encoder_package")
        tasks = [task_facts_from(task) for task in facts["tasks"]]
        ENCODERS.check(str(encoder.get("encoder")), None if package is None else str(package))
        # A description without a width of norms is from before there was one to set.
        settings = {**settings, "encoder": {"norm_width": SMALLEST_WIDTH, **encoder}}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the model's description lacks or misuses a field ({error}).") from error
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ConfigError(f"the model's description names the tasks {names}; it must name its tasks, each once.")
    return AtomisticModel(parse_settings(ModelSettings, settings, "the model's description: settings"), tasks)
