"""The run file: what a training run is, except for what the DeepSpeed JSON owns.

The JSON owns accumulation, optimizer, schedule, clipping, precision and ZeRO; the run file names it and may override
single values of it in its `[deepspeed]` table.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydrazero.models.atomistic import ModelSettings
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.encoders.sizes import size_settings
from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.location import is_remote
from hydrazero.shards.settings_parser import parse_settings
from hydrazero.trainer.balance import BalanceSection, check_balance
from hydrazero.trainer.config.finetune_section import FULL, FinetuneSection, check_finetune

LOSS_KINDS = ("l1", "l2", "huber")
LOSS_PARTS = ("energy", "forces", "stress", "spread")
FORCE_ERRORS = ("components", "norm")


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where the run lives and how it starts."""

    out: str
    """Folder of the run; relative to the folder where the command is given."""
    seed: int = 0
    """Of weights and data order."""
    start_from: str = ""
    """Run folder or exported model whose weights the run starts with: encoder and embedding, and what fits of the heads
    of tasks of the same name, unless a task's `init_head` says otherwise."""
    wandb: str = ""
    """Project of Weights & Biases that numbers and pictures go to as well; none if it is empty."""


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """One task: a dataset with its own head."""

    name: str
    shards: str
    """Folder that 'hydrazero convert' wrote; or its web address, or 'pipe:COMMAND {}' that prints the file {} of it."""
    weight: float = 1.0
    """Of the task's loss in the sum over tasks."""
    share: float | None = None
    """Of the structures in batches; if not set, what others leave, by data.temperature."""
    init_head: str = ""
    """Head of run.start_from that the task's begins as, with its scale, and with reference energies refitted to the
    task's structures: the name of a task there, 'nearest' (of the lowest force error on them), 'mean' of all, or 'new'
    for first weights; 'own' takes the head of the same name as it is, references and all. If not set, weights are those
    of the head of the same name, where there is one, but scale and references come from the shards."""
    forces: str | None = None
    """'conservative' (the gradient of the energy), 'direct' (a head of their own) or 'none'; conservative if there are
    energies."""
    stress: str | None = None
    """As forces, which it follows if it is not set."""
    charge_spin: bool | None = None
    """Whether the encoder is told total charge and spin; if not set, it is where the shards hold charged or open-shell
    structures."""
    targets: tuple[str, ...] | None = None
    """Of the targets in the shards, those that are trained; all if not set."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """How the shards are streamed."""

    temperature: float = 1.0
    """Tasks are sampled in proportion to structures ** (1 / temperature)."""
    workers: int = 1
    """Worker processes per rank that read, find neighbours and pack."""
    on_bad_shard: str = "stop"
    """'stop' where a block of a shard cannot be read, or 'skip' its structures, counted in the log and the report."""
    copies: str = ""
    """Folder on each node's own disk with a copy of each task's shards, in a folder of the task's name, which are read
    instead; jobs that `hydrazero launch` writes make them."""

    def folder(self, task: TaskSection) -> str:
        """Where a task's shards are read."""
        return f"{self.copies}/{task.name}" if self.copies and not is_remote(task.shards) else task.shards


@dataclass(frozen=True, kw_only=True)
class ModelSection(EncoderSettings):
    """The encoder's settings, and those of the heads (see `ModelSettings`)."""

    size: str = ""
    """'tiny', 'small', 'base' or 'large': sets features, layers and the like where they are not set themselves."""
    head_features: int = ModelSettings.head_features
    """Width of the hidden layers of each head."""
    head_layers: int = ModelSettings.head_layers
    """Hidden layers of each head."""
    ensemble: int = ModelSettings.ensemble
    """Energies that each head gives; their mean is the prediction, their spread its uncertainty."""
    repulsion: str = ModelSettings.repulsion
    """'none', or 'zbl' for the screened repulsion of nuclei at short range."""
    task_embedding: bool = ModelSettings.task_embedding
    """Whether atoms are told their task from the first layer."""
    attention_targets: tuple[str, ...] = ()
    """Intensive targets whose mean over atoms is weighted by attention."""

    def settings(self) -> ModelSettings:
        """Return them in the form that the model takes."""
        encoder = EncoderSettings(**{item.name: getattr(self, item.name) for item in fields(EncoderSettings)})
        heads = {item.name: getattr(self, item.name) for item in fields(ModelSettings) if item.name != "encoder"}
        return ModelSettings(encoder=encoder, **heads)


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """Per-task loss: weights times L(energy per atom / scale), L(force component / scale), and so on."""

    kind: str = "huber"
    """'l1', 'l2' or 'huber'."""
    huber_delta: float = 0.1
    """Where the Huber loss turns from square to linear, in units of the task's scale."""
    energy_weight: float = 1.0
    forces_weight: float = 1.0
    stress_weight: float = 0.1
    """Of stress components over the typical stress of the task; 0 leaves stress untrained."""
    spread_weight: float = 1.0
    """Of the likelihood by which an ensemble learns its spread; it moves the heads alone."""
    target_weights: dict[str, float] = field(default_factory=dict)
    """Target -> weight of its loss; 1 for those that are not named."""
    force_errors: str = "components"
    """'components', each a loss of its own, or 'norm', the length of an atom's error, which no rotation changes."""
    final_weights: dict[str, float] = field(default_factory=dict)
    """'energy', 'forces', 'stress', 'spread' or a target -> weight at the end of the run; those not named stay."""
    change_from: float = 0.5
    """Share of the steps after which weights begin to change to the final ones."""
    change_until: float = 0.75
    """Share of the steps after which they are the final ones; linear in between."""

    def weight(self, quantity: str) -> float:
        """Return the weight of 'energy', 'forces', 'stress', 'spread' or a target at the start."""
        if quantity in LOSS_PARTS:
            weight: float = getattr(self, f"{quantity}_weight")
            return weight
        return self.target_weights.get(quantity, 1.0)

    def final_weight(self, quantity: str) -> float:
        """Return the weight of a quantity at the end of the run."""
        return self.final_weights.get(quantity, self.weight(quantity))

    def change(self, share: float) -> float:
        """Return how far weights have changed after a share of the steps: 0 before, 1 once they are final."""
        if share >= self.change_until:
            return 1.0
        return 0.0 if share <= self.change_from else (share - self.change_from) / (self.change_until - self.change_from)


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How long, and how often things happen; all counted in optimizer steps."""

    steps: int
    evaluate_every: int = 500
    checkpoint_every: int = 500
    log_every: int = 10
    keep_checkpoints: int = 3
    keep_best: bool = True
    """Whether the checkpoint of the lowest validation loss is kept too; evaluated and exported by default."""
    patience: int = 0
    """Evaluations without a new lowest validation loss after which the run stops; 0: it goes through."""
    average: float = 0.999
    """Decay of the moving average of the weights, which is evaluated and exported by default; 0: none."""
    freeze: tuple[str, ...] = ()
    """Patterns of names of parameters that are not trained: 'encoder.*'."""
    max_hours: float = 0.0
    """The run stops with a checkpoint after so many hours; 0: it has time."""
    budget_seconds: float = 0.0
    """Seconds of steps, those before a resume among them, after which the run evaluates and ends; 0: it has time.
    Evaluations, checkpoints, and the first step after a start, which compiles, do not count."""
    timeout_minutes: float = 10.0
    """Minutes that ranks wait for one that does not answer before the run stops."""
    max_skipped: int = 10
    """Steps in a row that may be skipped, since loss or gradient are not finite, before the run stops."""
    skip_spikes: float = 0.0
    """Steps whose loss is so many standard deviations above the last ones' are skipped; 0: none."""
    compile: bool = False
    """Whether each step is traced as one graph and compiled: several times faster, after a minute at the start."""


@dataclass(frozen=True, kw_only=True)
class PlanSection:
    """What `hydrazero plan` is to take of shards that are not there yet."""

    structures: dict[str, int] = field(default_factory=dict)
    """Task -> training structures; not needed for tasks that have the name of a preset which knows."""
    atoms: dict[str, float] = field(default_factory=dict)
    """Task -> atoms of a structure, mean."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run file."""

    run: RunSection
    tasks: tuple[TaskSection, ...]
    train: TrainSection
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    batch: BatchShape = field(default_factory=lambda: BatchShape(structures=32, atoms=1024, slots=16384))
    loss: LossSection = field(default_factory=LossSection)
    balance: BalanceSection = field(default_factory=BalanceSection)
    finetune: FinetuneSection = field(default_factory=FinetuneSection)
    plan: PlanSection = field(default_factory=PlanSection)
    deepspeed: dict[str, Any] = field(default_factory=lambda: {"config": "zero1"})
    """`config`: a name in ds_configs or a path to a JSON; every other key overrides a value of it."""

    @property
    def shares(self) -> tuple[float | None, ...]:
        """Fixed shares of the tasks in batches; empty if none has one."""
        shares = tuple(task.share for task in self.tasks)
        return () if all(share is None for share in shares) else shares


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply 'section.key=value' overrides; raises ConfigError naming file and key."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"run file {path} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"run file {path} is not valid TOML: {error}.") from error
    for override in overrides:
        apply_override(table, override)
    _apply_size(table, f"{path}:")
    config = parse_settings(RunConfig, table, f"{path}:")
    _check(config, f"{path}:")
    return config


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set a value of a run file's tables by 'section.key=value'; raises ConfigError for what is not of that form."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {override} is not of the form section.key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a text, so that --set run.out=runs/a needs no quotes
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: '{name}' is no table.")
    table[names[-1]] = value


def _apply_size(table: dict[str, Any], where: str) -> None:
    """Fill in what the size of the model stands for; what the run file says itself stays."""
    model = table.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("size"), str):
        return
    encoder = model.get("encoder", EncoderSettings.encoder)
    try:
        table["model"] = {**size_settings(str(encoder), model["size"]), **model}
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from error


def _check(config: RunConfig, where: str) -> None:
    names = [task.name for task in config.tasks]
    if not names:
        raise ConfigError(f"{where} tasks is empty; a run needs at least one [[tasks]].")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where} task '{name}' is named twice.")
    if config.loss.kind not in LOSS_KINDS:
        raise ConfigError(
            f"{where} loss.kind '{config.loss.kind}' is not known{did_you_mean(config.loss.kind, list(LOSS_KINDS))}."
        )
    if config.loss.force_errors not in FORCE_ERRORS:
        known = did_you_mean(config.loss.force_errors, list(FORCE_ERRORS))
        raise ConfigError(f"{where} loss.force_errors '{config.loss.force_errors}' is not known{known}.")
    if not 0 <= config.loss.change_from <= config.loss.change_until <= 1:
        raise ConfigError(
            f"{where} loss.change_from = {config.loss.change_from} and loss.change_until = {config.loss.change_until} "
            "are shares of the run and must obey 0 <= change_from <= change_until <= 1."
        )
    if not any(task.weight for task in config.tasks):
        raise ConfigError(f"{where} every task has the weight 0; at least one must be above 0.")
    if config.data.on_bad_shard not in ("stop", "skip"):
        known = did_you_mean(config.data.on_bad_shard, ["stop", "skip"])
        raise ConfigError(f"{where} data.on_bad_shard '{config.data.on_bad_shard}' is not known{known}.")
    if not config.data.temperature >= 1:
        raise ConfigError(f"{where} data.temperature is {config.data.temperature}; it must be at least 1.")
    if not 0 <= config.train.average < 1:
        raise ConfigError(f"{where} train.average is {config.train.average}; it must be at least 0 and below 1.")
    check_balance(config.balance, where)
    check_finetune(config.finetune, where)
    _check_start(config, where)
    _check_shares(config, where)
    _check_ranges(config, where)


def _check_start(config: RunConfig, where: str) -> None:
    """Raise ConfigError for what only runs can have that start from another model."""
    if config.run.start_from:
        return
    if config.finetune.method != FULL:
        raise ConfigError(
            f"{where} finetune.method = '{config.finetune.method}' needs a model to start from; set run.start_from."
        )
    for task in config.tasks:
        if task.init_head:
            raise ConfigError(
                f"{where} task '{task.name}' has init_head = '{task.init_head}', but there is no model with heads; set "
                "run.start_from."
            )


def _check_shares(config: RunConfig, where: str) -> None:
    shares = [task.share for task in config.tasks if task.share is not None]
    for task in config.tasks:
        if task.share is not None and not 0 < task.share <= 1:
            raise ConfigError(f"{where} share of task '{task.name}' is {task.share}; it must be above 0 and at most 1.")
    total, all_have = sum(shares), len(shares) == len(config.tasks)
    if all_have and abs(total - 1) > 1e-6:
        raise ConfigError(f"{where} the shares of the tasks add up to {total:g}, not to 1; leave one of them out.")
    if shares and not all_have and total >= 1:
        raise ConfigError(f"{where} the shares of some tasks add up to {total:g} and leave nothing for the others.")


def _check_ranges(config: RunConfig, where: str) -> None:
    """Raise ConfigError for a number that is out of range, NaN or infinite."""
    positive: dict[str, float] = {
        "train.steps": config.train.steps,
        "train.evaluate_every": config.train.evaluate_every,
        "train.checkpoint_every": config.train.checkpoint_every,
        "train.log_every": config.train.log_every,
        "train.keep_checkpoints": config.train.keep_checkpoints,
        "train.timeout_minutes": config.train.timeout_minutes,
        "train.max_skipped": config.train.max_skipped,
        "batch.structures": config.batch.structures,
        "batch.atoms": config.batch.atoms,
        "batch.slots": config.batch.slots,
        "model.features": config.model.features,
        "model.layers": config.model.layers,
        "model.radial_functions": config.model.radial_functions,
        "model.head_features": config.model.head_features,
        "model.head_layers": config.model.head_layers,
        "model.ensemble": config.model.ensemble,
        "model.cutoff": config.model.cutoff,
        "loss.huber_delta": config.loss.huber_delta,
    }
    # NaN is not above 0, and not below or equal to it either: 'value <= 0' would let it pass.
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{where} {key} is {value}; it must be a number above 0.")
    not_negative: dict[str, float] = {
        "run.seed": config.run.seed,
        "data.workers": config.data.workers,
        "batch.edges": config.batch.edges,
        "train.patience": config.train.patience,
        "train.max_hours": config.train.max_hours,
        "train.budget_seconds": config.train.budget_seconds,
        "train.skip_spikes": config.train.skip_spikes,
        "loss.energy_weight": config.loss.energy_weight,
        "loss.forces_weight": config.loss.forces_weight,
        "loss.stress_weight": config.loss.stress_weight,
        "loss.spread_weight": config.loss.spread_weight,
        **{f"loss.target_weights.{name}": weight for name, weight in config.loss.target_weights.items()},
        **{f"loss.final_weights.{name}": weight for name, weight in config.loss.final_weights.items()},
        **{f"weight of task '{task.name}'": task.weight for task in config.tasks},
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{where} {key} is {value}; it must be a number of at least 0.")
