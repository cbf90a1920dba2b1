"""The sections of the run file, except [balance] (`trainer.balance`), [batch] (`BatchShape`) and [finetune]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import HeadSettings, ModelSettings
from hydrazero.shards.location import ShardCommand, is_remote, location_in_run_file
from hydrazero.shards.settings_parser import ListOf, Section
from hydrazero.shards.text.names import FileName

LOSS_PARTS = ("energy", "forces", "stress", "spread")

Way = Literal["conservative", "direct", "none"]
"""How forces or stress are predicted."""


class RunSection(Section):
    """The folder of the run, and the model from which it starts."""

    out: str
    """Run folder, in which everything that the run writes is stored. A relative path counts from the folder in which
    the command is given."""
    seed: NonNegativeInt = 0
    """Seed of the random numbers for the first weights and for the order of the data."""
    start_from: str = ""
    """Run folder or exported model whose weights the run starts with: the encoder, the embedding, and whatever fits in
    the heads of tasks that have the same name. A task's `init_head` can choose another head. If it is empty, the run
    starts with random weights."""
    wandb: str = ""
    """Project of Weights & Biases to which metrics and figures are sent as well. If it is empty, nothing is sent."""


class TaskSection(Section):
    """One task: a dataset that has its own head in the model."""

    name: FileName
    """Name of the task, under which its head is found in the exported model."""
    shards: str
    """Folder that `hydrazero convert` has written, its web address, or 'pipe:COMMAND {}' with a command that prints the
    file {} of the folder. The shell runs the command, so start only run files that you have read."""
    weight: NonNegativeFloat = 1.0
    """Weight of the task's loss in the sum over all tasks."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the structures in a batch that come from this task. Tasks without a `share` divide what the others
    leave, by `data.temperature`."""
    init_head: str = ""
    """Head of the model `run.start_from` from which this task's head starts, with its scale and with reference energies
    that are fitted again to the task's structures: the name of a task of that model; 'nearest' for the head with the
    lowest force error on the task's structures; 'mean' for the mean of all heads; 'new' for random weights; or 'own'
    for the head of the same name without any change, its reference energies included. If it is empty, the weights are
    those of the head of the same name if there is one, and the scale and the reference energies come from the
    shards."""
    forces: Way | None = None
    """How forces are predicted: 'conservative' (the negative gradient of the energy), 'direct' (by an output of their
    own) or 'none'. If it is not set, they are conservative if the shards hold energies."""
    stress: Way | None = None
    """How stress is predicted; the values are those of `forces`. If it is not set, it follows `forces`."""
    charge_spin: bool | None = None
    """Whether the total charge and the spin multiplicity are inputs of the model. If it is not set, they are if the
    shards hold charged or open-shell structures."""
    targets: ListOf[str] | None = None
    """Names of the targets in the shards that are trained. If it is not set, all of them are."""

    @property
    def location(self) -> str | ShardCommand:
        """Return where the shards are: a folder, a web address, or a command of this run file."""
        return location_in_run_file(self.shards)


class DataSection(Section):
    """The reading of structures from the shards."""

    temperature: Annotated[float, Field(ge=1)] = 1.0
    """Tasks are sampled in proportion to (number of structures) ** (1 / temperature): at 1 in proportion to their size,
    at high temperatures all alike."""
    workers: NonNegativeInt = 1
    """Number of data-loading processes of each rank, which read structures, build neighbour lists and pack batches. At
    0, the training process does this itself."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """What happens if a part of a shard is damaged: 'stop' ends the run, 'skip' skips its structures and counts them in
    the log and in the report."""
    copies: str = ""
    """Folder on the local disk of each node that holds a copy of every task's shards, each in a folder of the task's
    name; the copies are read instead of the originals. Jobs that `hydrazero launch` writes make these copies."""

    def folder(self, task: TaskSection) -> str | ShardCommand:
        """Return the location from which a task's shards are read."""
        return f"{self.copies}/{task.name}" if self.copies and not is_remote(task.location) else task.location


class ModelSection(EncoderSettings, HeadSettings):
    """The encoder and the heads of the model."""

    size: Literal["", "tiny", "small", "base", "large"] = ""
    """Size of the model: 'tiny', 'small', 'base' or 'large'. It sets `features`, `layers`, `radial_functions`,
    `head_features` and the encoder's own sizes wherever the run file does not set them."""

    def settings(self) -> ModelSettings:
        """Return the settings in the form in which the model takes them."""
        encoder = EncoderSettings(**{key: getattr(self, key) for key in EncoderSettings.model_fields})
        return ModelSettings(encoder=encoder, **{key: getattr(self, key) for key in HeadSettings.model_fields})


class LossSection(Section):
    """The loss of each task: the weighted sum of the losses of energy per atom, force components, and so on.

    Every error is divided by the task's scale before its loss is taken.
    """

    kind: Literal["l1", "l2", "huber"] = "huber"
    """Loss function of an error: 'l1' (absolute), 'l2' (square) or 'huber' (square for small errors, then linear)."""
    huber_delta: PositiveFloat = 0.1
    """Error at which the Huber loss changes from square to linear, in units of the task's scale."""
    energy_weight: NonNegativeFloat = 1.0
    """Weight of the loss of the energy per atom."""
    forces_weight: NonNegativeFloat = 1.0
    """Weight of the loss of the force components."""
    stress_weight: NonNegativeFloat = 0.1
    """Weight of the loss of the stress components, which are divided by the task's typical stress. At 0, stress is not
    trained."""
    spread_weight: NonNegativeFloat = 1.0
    """Weight of the likelihood from which an ensemble of energies learns its spread. It changes the heads alone."""
    target_weights: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Weights of the losses of targets, by name. Targets that are not named have the weight 1."""
    force_errors: Literal["components", "norm"] = "components"
    """'components' takes the loss of each force component; 'norm' takes that of the length of an atom's force error,
    which does not depend on the orientation of the axes."""
    final_weights: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Weights at the end of the run for 'energy', 'forces', 'stress', 'spread' or the names of targets. Weights that
    are not named do not change."""
    change_from: float = 0.5
    """Fraction of the steps after which weights begin to change towards `final_weights`."""
    change_until: float = 0.75
    """Fraction of the steps after which weights have reached `final_weights`; the change is linear in between."""

    @model_validator(mode="after")
    def _check_change(self) -> LossSection:
        if not 0 <= self.change_from <= self.change_until <= 1:
            raise ValueError(
                f"change_from is {self.change_from} and change_until is {self.change_until}; they are fractions of "
                "the run and must obey 0 <= change_from <= change_until <= 1."
            )
        return self

    def weight(self, quantity: str) -> float:
        """Return the weight of 'energy', 'forces', 'stress', 'spread' or a target at the start of the run."""
        if quantity in LOSS_PARTS:
            weight: float = getattr(self, f"{quantity}_weight")
            return weight
        return self.target_weights.get(quantity, 1.0)

    def final_weight(self, quantity: str) -> float:
        """Return the weight of 'energy', 'forces', 'stress', 'spread' or a target at the end of the run."""
        return self.final_weights.get(quantity, self.weight(quantity))

    def change(self, fraction: float) -> float:
        """Return how far weights have changed after a fraction of the steps, from 0 (not at all) to 1 (final)."""
        if fraction >= self.change_until:
            return 1.0
        start, end = self.change_from, self.change_until
        return 0.0 if fraction <= start else (fraction - start) / (end - start)


class TrainSection(Section):
    """Length of the run, and intervals between evaluations, checkpoints and rows of the log, in optimizer steps."""

    steps: PositiveInt
    """Number of steps of the run."""
    evaluate_every: PositiveInt = 500
    """Number of steps between evaluations on the validation split."""
    checkpoint_every: PositiveInt = 500
    """Number of steps between checkpoints."""
    log_every: PositiveInt = 10
    """Number of steps between rows of the log and of metrics.jsonl."""
    keep_checkpoints: PositiveInt = 3
    """Number of most recent checkpoints that are kept; older ones are deleted."""
    keep_best: bool = True
    """Whether the checkpoint with the lowest validation loss is kept too. By default, it is the one that is evaluated
    and exported."""
    patience: NonNegativeInt = 0
    """Early stopping: the run ends after this number of evaluations without a new lowest validation loss. At 0, it does
    not end early."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay per step of the moving average of the weights, which is evaluated and exported by default. At 0, there is
    no average."""
    freeze: ListOf[str] = ()
    """Patterns of the names of parameters that are not trained, such as 'encoder.*'."""
    max_hours: NonNegativeFloat = 0.0
    """Time limit in hours: the run stops with a checkpoint when it is reached. At 0, there is no limit."""
    budget_seconds: NonNegativeFloat = 0.0
    """Limit on the time spent in steps, in seconds, after which the run evaluates and ends; the time before a resume
    counts. Evaluations, checkpoints, and the first step after a start, which may compile, do not count. At 0, there is
    no limit."""
    timeout_minutes: PositiveFloat = 10.0
    """Minutes that ranks wait for a rank that does not answer before the run stops."""
    max_skipped: PositiveInt = 10
    """Number of successive steps that may be skipped because of a non-finite loss or gradient before the run stops."""
    skip_spikes: NonNegativeFloat = 0.0
    """Loss spikes: a step is skipped if its loss is this number of standard deviations above the recent losses. At 0,
    no step is skipped for its loss."""
    compile: bool = False
    """Whether each step is traced as one graph and compiled, which makes it several times faster after a minute at the
    start."""


class PlanSection(Section):
    """Assumptions of `hydrazero plan` about shards that do not exist yet."""

    structures: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Number of training structures, by task. It is not needed for a task that is named like a preset which knows the
    number."""
    atoms: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Mean number of atoms of a structure, by task."""
