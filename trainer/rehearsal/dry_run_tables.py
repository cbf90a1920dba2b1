"""The results of a dry run, and the tables that it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from hydrazero.shards.manifest import Manifest
from hydrazero.shards.stream.deal import mixture_repeats
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.cost.run_memory import RunMemory, megabytes
from hydrazero.trainer.cost.step_memory import peak_memory_mb
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.engine.zero_layout import full_size
from hydrazero.trainer.ranks.distributed import ranks
from hydrazero.trainer.records.progress_line import duration


@dataclass(frozen=True, kw_only=True)
class MeasuredSteps:
    """Results of the steps of a dry run."""

    loss: float
    """Loss of the second step."""
    step_seconds: float
    """Seconds of the second step on the slowest rank."""
    wait_seconds: float
    """Seconds of these in which ranks waited for data."""
    validation_seconds: float
    """Seconds of one validation batch on each rank."""
    structures: float
    """Mean fraction of the structures of a batch that is used."""
    atoms: float
    """Mean fraction of the atoms of a batch that is used."""
    slots: float
    """Mean fraction of the neighbour slots of a batch that is used."""
    in_batch: float
    """Mean number of structures in a batch."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that a dry run has found out."""

    config: RunConfig
    ds_config: dict[str, Any]
    """DeepSpeed JSON."""
    manifests: Sequence[Manifest]
    """The manifest of each task's shards."""
    engine: TrainingEngine
    memory: RunMemory
    measured: MeasuredSteps


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def tasks_table(found: Findings) -> Table:
    """Return a table with a row for each task: structures, elements, how often it is drawn, what it is trained on."""
    table = _table(f"{found.config.run.out}: tasks")
    for heading in ("task", "train", "val", "atoms\nat most", "elements", "drawn\n%", "weight", "trained on"):
        texts = heading in ("task", "trained on")
        table.add_column(heading, justify="left" if texts else "right", no_wrap=heading != "trained on")
    counts = [manifest.structures("train") for manifest in found.manifests]
    repeats = mixture_repeats(counts, found.config.data.temperature, found.config.shares)
    drawn = [count * repeat for count, repeat in zip(counts, repeats, strict=True)]
    for number, (task, manifest) in enumerate(zip(found.config.tasks, found.manifests, strict=True)):
        table.add_row(
            task.name,
            f"{counts[number]:,}",
            f"{manifest.structures('val'):,}",
            str(manifest.max_atoms),
            str(len(manifest.trained_elements)),
            f"{100 * drawn[number] / sum(drawn):.1f}",
            f"{task.weight:g}",
            ", ".join(_trained_on(found, number)) or "-",
        )
    return table


def _trained_on(found: Findings, number: int) -> list[str]:
    """Return the quantities that a task predicts, has labels of, and trains with a weight."""
    manifest, objective = found.manifests[number], found.engine.module.objective
    held = {*manifest.labels, *manifest.targets} | ({"energy"} if "energy_per_atom" in manifest.labels else set())
    predicted = zip(objective.quantities, objective.predicted[number].tolist(), strict=True)
    loss = objective.settings
    trained = [name for name, does in predicted if does and name in held]
    return [name for name in trained if loss.weight(name) or loss.final_weight(name)]


def run_table(found: Findings) -> Table:
    """Return the table of what the run will take."""
    config, memory, measured, engine = found.config, found.memory, found.measured, found.engine
    accumulated = engine.gradient_accumulation_steps()
    sizes = ", ".join(f"{size:,} {name}" for name, size in config.batch if size)
    filled = (f"{getattr(measured, name):.0%} of the {name}" for name in ("structures", "atoms", "slots"))
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    trained = sum(full_size(parameter) for parameter in parameters)
    optimizer, scheduler = (found.ds_config.get(key, {}).get("type") for key in ("optimizer", "scheduler"))
    states = f"{megabytes(memory.states)} of weights, gradients, optimizer"
    eager = ", eagerly; compiled, the run is faster" if config.train.compile else ""
    seconds, evaluations = whole_run(found)
    evaluated = f"{evaluations} evaluation{'' if evaluations == 1 else 's'}"
    table = _table("the run")
    table.show_header = False
    for name, value in (
        ("ranks", f"{ranks()}, {accumulated} batches of each a step" if accumulated > 1 else str(ranks())),
        ("batch", sizes),
        ("filled", ", ".join(filled)),
        ("model", f"{config.model.encoder}, {trained:,} trained parameters"),
        ("DeepSpeed", f"ZeRO {engine.zero_optimization_stage()}, {optimizer}, {scheduler or 'no schedule'}"),
        (
            "memory of a rank",
            f"about {megabytes(memory.step)} in a step, {states}; {megabytes(memory.at_hand)} are available",
        ),
        ("peak so far", f"{peak_memory_mb():,.0f} MB on rank 0, for the whole process"),
        ("loss", f"{measured.loss:.4g} in the second step"),
        ("a step", f"{measured.step_seconds:.3g} s, of which {measured.wait_seconds:.2g} s wait for data{eager}"),
        ("the whole run", f"about {duration(seconds)} for {config.train.steps:,} steps and {evaluated}"),
    ):
        table.add_row(name, value)
    return table


def whole_run(found: Findings) -> tuple[float, int]:
    """Return the seconds of the complete run at the rate of the second step, and its number of evaluations."""
    train, measured = found.config.train, found.measured
    evaluations = -(-train.steps // train.evaluate_every)
    validated = sum(manifest.structures("val") for manifest in found.manifests)
    batches = validated / (max(measured.in_batch, 1.0) * ranks())
    return train.steps * measured.step_seconds + evaluations * batches * measured.validation_seconds, evaluations
