"""The text of a proposed run file: every value with a comment that explains it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrazero.shards.files import toml_text
from hydrazero.shards.manifest import Manifest
from hydrazero.trainer.propose.propose_batch import ProposedBatch
from hydrazero.trainer.propose.run_length import RunLength

WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class RunProposal:
    """Everything that a proposed run file says."""

    run_file: Path
    """Run file to write."""
    run_dir: Path
    """Run folder, which the run file names."""
    folders: tuple[Path, ...]
    """Shard folders."""
    manifests: tuple[Manifest, ...]
    """Manifest of each task."""
    encoder: str
    """Name of the encoder."""
    size: str
    """Size of the model."""
    cutoff: float
    """Distance in Å up to which two atoms are neighbours."""
    temperature: float
    """Value of `data.temperature`."""
    batch: ProposedBatch
    """The batch of each rank."""
    ranks: int
    """Number of training processes."""
    threads: int | None
    """Number of threads of each; None: not chosen here, so that it is what `hydrazero train` takes by itself."""
    why_ranks: str
    """Sentence on how ranks and threads were chosen; empty if they were not measured."""
    device: str
    """Description of the devices on which the ranks compute."""
    rate: float
    """Maximum learning rate."""
    length: RunLength
    """The values of [train]."""

    @property
    def labels(self) -> set[str]:
        """Names of the labels that any task has."""
        return {name for manifest in self.manifests for name in manifest.labels}


def run_text(proposal: RunProposal) -> str:
    """Return a run file as commented TOML."""
    parts = [
        _comment(
            f"Run file written by hydrazero init for {proposal.device}. Every value can be changed. Train with:\n"
            f"    {train_command(proposal)}\n"
            f"{proposal.why_ranks}The number of ranks (processes that train together) may be another one; each rank "
            "computes its own batch. "
            "'hydrazero train --dry-run' checks the file without training."
        ),
        _run(proposal),
        *(_task(folder, one) for folder, one in zip(proposal.folders, proposal.manifests, strict=True)),
        *([_data(proposal)] if len(proposal.manifests) > 1 else []),
        _model(proposal),
        _batch(proposal),
        _loss(proposal),
        _train(proposal),
        _deepspeed(proposal),
    ]
    return "\n".join(parts)


def train_command(proposal: RunProposal) -> str:
    """Return the command that trains the proposed run file."""
    command = f"hydrazero train {proposal.run_file}"
    if proposal.threads is not None:
        return f"{command} --ranks {proposal.ranks} --threads {proposal.threads}"
    return f"{command} --ranks {proposal.ranks}" if proposal.ranks > 1 else command


def _comment(text: str) -> str:
    """Return comment lines; lines of the text that are indented are kept as they are."""
    lines = []
    for line in text.splitlines():
        lines += [line] if line.startswith(" ") else textwrap.wrap(line, WIDTH - 2)
    return "".join(f"# {line}\n" for line in lines)


def _section(heading: str, *entries: tuple[str, Any, str], before: str = "") -> str:
    """Return a section: its heading, and for each (key, value, explanation) a comment and the value."""
    body = "".join(f"{_comment(why) if why else ''}{toml_text({key: value})}" for key, value, why in entries)
    return f"{_comment(before) if before else ''}{heading}\n{body}"


def _run(proposal: RunProposal) -> str:
    return _section(
        "[run]",
        ("out", str(proposal.run_dir), "Folder for checkpoints, metrics and logs. It must not contain a run yet."),
        ("seed", 0, "Seed of the initial weights and of the order of the structures."),
    )


def _task(folder: Path, manifest: Manifest) -> str:
    train, val, test = (manifest.structures(split) for split in ("train", "val", "test"))
    labels = [name for name in ("energy", "forces", "stress") if name in _names(manifest.labels)] + [*manifest.targets]
    elements = manifest.trained_elements
    shown = ", ".join(elements) if len(elements) <= 10 else f"{len(elements)} elements"
    about = (
        f"{train:,} training, {val:,} validation and {test:,} test structures of {shown}; labels: "
        f"{', '.join(labels) or 'none'}."
    )
    if not val:
        about += " There are no validation structures, so that this task has no errors during training."
    return _section("[[tasks]]", ("name", manifest.task, ""), ("shards", str(folder), ""), before=about)


def _names(labels: dict[str, Any]) -> set[str]:
    return {name.partition("_")[0] for name in labels}


def _data(proposal: RunProposal) -> str:
    why = (
        "Tasks are drawn in proportion to (number of structures)^(1/temperature): 1 in proportion to their size; "
        "larger values draw small tasks more often."
    )
    return _section("[data]", ("temperature", proposal.temperature, why))


def _model(proposal: RunProposal) -> str:
    return _section(
        "[model]",
        ("encoder", proposal.encoder, "Graph neural network that all tasks share."),
        ("size", proposal.size, "tiny, small, base or large; larger models are more accurate and slower."),
        ("cutoff", proposal.cutoff, "Two atoms within this distance (Å) are neighbours."),
    )


def _batch(proposal: RunProposal) -> str:
    batch = proposal.batch
    about = (
        f"Every batch of a rank has this fixed size and holds about {batch.structures} structures. Batches are filled "
        f"with different structures and padded: {batch.fill.atoms:.0%} of the atoms and {batch.fill.slots:.0%} of the "
        f"slots (places for neighbours) are used. A training step needs about {batch.step_bytes / 1e9:.2g} GB per "
        "rank. To change the size, use 'hydrazero inspect --propose-batch'."
    )
    shape = batch.shape
    return _section(
        "[batch]",
        ("structures", shape.structures, "Maximum number of structures, atoms, slots and pairs of neighbours (edges)."),
        ("atoms", shape.atoms, ""),
        ("slots", shape.slots, ""),
        ("edges", shape.edges, ""),
        before=about,
    )


def _loss(proposal: RunProposal) -> str:
    labels = _names(dict.fromkeys(proposal.labels))
    entries: list[tuple[str, Any, str]] = [
        (
            "kind",
            "huber",
            "Quadratic for errors below huber_delta (in units of the task's typical force), linear for larger ones, so "
            "that outliers do not dominate. l1 is linear everywhere, l2 quadratic.",
        ),
        ("huber_delta", 1.0, ""),
    ]
    if "energy" in labels:
        entries.append(("energy_weight", 5.0, "Weight of the error of the energy per atom."))
    if "forces" in labels:
        why = "Weight of the error of the force components. More weight on one improves it at the expense of the other."
        entries.append(("forces_weight", 1.0, why))
    if "stress" in labels:
        entries.append(("stress_weight", 0.1, "Weight of the error of the stress; 0 leaves the stress untrained."))
    return _section("[loss]", *entries)


def _train(proposal: RunProposal) -> str:
    length = proposal.length
    return _section(
        "[train]",
        ("steps", length.steps, length.why_steps),
        (
            "evaluate_every",
            length.every,
            f"Errors of the validation structures are computed after every {length.every:,} steps, and a checkpoint is "
            "written.",
        ),
        ("checkpoint_every", length.every, ""),
        ("log_every", length.log_every, "Steps between two lines of the log."),
        ("keep_best", length.keep_best, length.why_best),
        ("patience", length.patience, length.why_patience),
        (
            "average",
            length.average,
            "Decay of the moving average of the weights, which is more accurate than the weights themselves and is "
            "what gets evaluated and exported.",
        ),
        ("compile", length.compile, length.why_compile),
    )


def _deepspeed(proposal: RunProposal) -> str:
    config = (
        "DeepSpeed settings by name or as a JSON file: ZeRO stage 1 (the optimizer state is divided among the ranks), "
        "AdamW, float32. The values below override single entries of it."
    )
    rate = (
        "Maximum learning rate. The rate rises to it over the first 100 steps (fewer in a short run), then falls along "
        "a cosine until the last step. Halve it if the loss jumps or diverges."
    )
    return "\n".join(
        (
            _section("[deepspeed]", ("config", "zero1", config)),
            _section("[deepspeed.optimizer.params]", ("lr", proposal.rate, rate)),
        )
    )
