"""What `hydrazero init` does: choose a batch, measure a few steps, and write a commented run file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydrazero.models.encoders import size_settings
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import ModelSettings
from hydrazero.shards.device import gpu_module
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import check_writable, replacing
from hydrazero.shards.manifest import Manifest, check_different_tasks, check_shard_files, read_manifest
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.cost.step_memory import SHARE, memory_at_hand
from hydrazero.trainer.propose.propose_batch import propose_batch
from hydrazero.trainer.propose.run_length import RunLength, run_length, structures_in
from hydrazero.trainer.propose.run_text import RunProposal, run_text, train_command
from hydrazero.trainer.ranks.launcher import THREADS_VARIABLE, train_ranks
from hydrazero.trainer.records.run_files import RUN_NAME
from hydrazero.trainer.rehearsal.measure_steps import StepTimes, read_step_times
from hydrazero.trainer.rehearsal.rehearse import MEASURE
from hydrazero.trainer.setup import check_run

RATES = {"tiny": 5e-3, "small": 5e-3, "base": 1e-3, "large": 5e-4}
"""Learning rate for each size of a model: larger models diverge at rates that suit small ones."""
CPU_RANKS = (1, 2, 4)
"""Numbers of ranks that are tried on a machine without a GPU; each rank may use several cores."""
FEWEST_OF_A_RANK = 8
"""Number of training structures that each rank gets at least; there are no more ranks than that allows."""
PER_STEP = 32
"""Structures in a step of all ranks together, if there are enough."""
SEVERAL_TASKS = 2.0
"""data.temperature for several tasks: small ones are drawn more often than in proportion to their size."""


@dataclass(frozen=True, kw_only=True)
class InitRequest:
    """The options of `hydrazero init`."""

    folders: tuple[Path, ...]
    """Shard folders, one for each task."""
    out: Path
    """Run file to write; the run's folder gets its name, without the suffix."""
    encoder: str
    """Name of the encoder."""
    size: str
    """Size of the model: tiny, small, base or large."""
    cutoff: float
    """Distance in Å up to which two atoms are neighbours."""
    hours: float
    """Time that the run may take, in hours."""
    ranks: int | None
    """Number of training processes; None: chosen for this machine, on a CPU with their threads and by measuring."""


def write_run_file(request: InitRequest, say: Callable[[str], None]) -> None:
    """Write a run file for the shards, after measuring a few training steps in a temporary folder.

    Raises ConfigError for options that cannot be used, ShardError for folders without complete shards, and SystemExit
    if a rank fails, which then has printed the reason.
    """
    _check_request(request)
    manifests = _manifests(request)
    layouts = _layouts(request, sum(manifest.structures("train") for manifest in manifests))
    proposals = [_proposal(request, manifests, ranks, threads) for ranks, threads in layouts]
    tried = " and ".join(_ranks(one) for one in proposals)
    say(f"measuring training steps with {tried} on {proposals[0].device}, which may take some minutes ...")
    measured = [(one, _measure(one)) for one in proposals]
    proposal, times = _fastest(request, measured)
    proposal = replace(proposal, length=_length(request, proposal, times))
    _write(proposal)
    length = proposal.length
    say(
        f"{request.out}: {len(proposal.manifests)} task{'s' if len(proposal.manifests) > 1 else ''}, {request.encoder} "
        f"{request.size} with {times.parameters:,} parameters, {length.steps:,} steps"
    )
    say(f"train with: {train_command(proposal)}")


def _ranks(proposal: RunProposal) -> str:
    ranks = f"{proposal.ranks} rank{'s' if proposal.ranks > 1 else ''}"
    if proposal.threads is None:
        return ranks
    return f"{ranks} of {proposal.threads} thread{'s' if proposal.threads > 1 else ''}"


def _fastest(request: InitRequest, measured: Sequence[tuple[RunProposal, StepTimes]]) -> tuple[RunProposal, StepTimes]:
    """Return the proposal whose ranks train on most structures in the hours, with a sentence on the others."""
    found = []
    for proposal, times in measured:
        val = sum(manifest.structures("val") for manifest in proposal.manifests)
        found.append(structures_in(hours=request.hours, ranks=proposal.ranks, val=val, times=times))
    proposal, times = measured[found.index(max(found))]
    if len(measured) == 1:
        return proposal, times
    speeds = ", ".join(
        f"{structures / (3600 * request.hours):.3g} structures/s with {_ranks(one)}"
        for (one, _), structures in zip(measured, found, strict=True)
    )
    return replace(proposal, why_ranks=f"Measured here, with evaluations: {speeds}. "), times


def _check_request(request: InitRequest) -> None:
    if request.out.exists():
        raise ConfigError(f"{request.out} exists; remove it or choose another name.")
    if request.out.suffix != ".toml":
        raise ConfigError(f"--out {request.out} must end with .toml; the run's folder is named after it.")
    check_writable(request.out.parent, "name another run file with --out")
    if not 0 < request.hours < float("inf"):
        raise ConfigError(f"--hours is {request.hours:g}; it must be a number above 0.")
    if not 0 < request.cutoff < float("inf"):
        raise ConfigError(f"--cutoff is {request.cutoff:g}; it must be a distance in Å above 0.")
    size_settings(request.encoder, request.size)  # raises for names that are not known


def _manifests(request: InitRequest) -> tuple[Manifest, ...]:
    """Return the folders' manifests; raise ConfigError or ShardError for folders that cannot be trained on."""
    manifests = tuple(read_manifest(folder) for folder in request.folders)
    check_different_tasks(manifests, request.folders)
    for manifest, folder in zip(manifests, request.folders, strict=True):
        if not manifest.structures("train"):
            raise ConfigError(f"{folder} holds no training structures; convert the data with some for training.")
        check_shard_files(manifest, folder)
    return manifests


def _proposal(request: InitRequest, manifests: tuple[Manifest, ...], ranks: int, threads: int | None) -> RunProposal:
    """Return everything but the length of the run, which is not measured yet."""
    train = sum(manifest.structures("train") for manifest in manifests)
    settings = size_settings(request.encoder, request.size)
    heads = settings.pop("head_features")
    encoder = EncoderSettings(encoder=request.encoder, cutoff=request.cutoff, **settings)
    temperature = SEVERAL_TASKS if len(manifests) > 1 else 1.0
    batch = propose_batch(
        request.folders,
        ModelSettings(encoder=encoder, head_features=heads),
        max(min(PER_STEP, -(-train // 8)) // ranks, 1),
        temperature=temperature,
        available=SHARE * memory_at_hand(ranks),
        smaller=True,
    )
    return RunProposal(
        run_file=request.out,
        run_dir=request.out.with_suffix(""),
        folders=request.folders,
        manifests=manifests,
        encoder=request.encoder,
        size=request.size,
        cutoff=request.cutoff,
        temperature=temperature,
        batch=batch,
        ranks=ranks,
        threads=threads,
        why_ranks="",
        device=_device(ranks),
        rate=RATES[request.size],
        length=run_length(hours=request.hours, ranks=ranks, train=train, val=0, times=None),
    )


def _layouts(request: InitRequest, train: int) -> list[tuple[int, int | None]]:
    """Return the numbers of ranks, and of threads of each, among which the choice is; threads are None for any number.

    On GPUs it is a rank for each. On a CPU the ranks share the cores, of which some may be left over. What the user has
    set is not measured against anything else: with OMP_NUM_THREADS, there are as many ranks as the cores hold with that
    many threads each. There are no more ranks than the structures can fill.
    """
    if request.ranks is not None:
        return [(request.ranks, None)]
    gpu = gpu_module()
    fed = max(train // FEWEST_OF_A_RANK, 1)
    if gpu is not None:
        return [(min(gpu.device_count(), fed), None)]
    cores = len(os.sched_getaffinity(0))
    if THREADS_VARIABLE in os.environ:
        return [(max(min(cores // _threads_set(), CPU_RANKS[-1], fed), 1), None)]
    layouts: list[tuple[int, int | None]] = [(ranks, cores // ranks) for ranks in CPU_RANKS if ranks <= min(cores, fed)]
    return layouts if len(layouts) > 1 else [(1, None)]


def _threads_set() -> int:
    """Return OMP_NUM_THREADS, of whose numbers for nested levels the first counts; raise ConfigError for others."""
    text = os.environ[THREADS_VARIABLE]
    first = text.partition(",")[0].strip()
    if not (first.isascii() and first.isdigit() and int(first)):
        raise ConfigError(
            f"{THREADS_VARIABLE} is '{text[:40]}'; set it to a number of threads, 1 or more, or unset it."
        )
    return int(first)


def _device(ranks: int) -> str:
    """Describe what `ranks` ranks compute on."""
    gpu = gpu_module()
    if gpu is None:
        cores = len(os.sched_getaffinity(0))
        return f"{cores} CPU core{'s' if cores > 1 else ''}"
    return f"{ranks} GPU{'s' if ranks > 1 else ''} ({gpu.get_device_name(0)})"


def _measure(proposal: RunProposal) -> StepTimes:
    """Measure steps as `hydrazero train` does them, with as many ranks, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="hydrazero-init-") as folder:
        run_file, run_dir = Path(folder) / "run.toml", Path(folder) / "run"
        run_file.write_text(run_text(replace(proposal, run_dir=run_dir)), encoding="utf-8")
        words, record = [f"--{MEASURE}"], run_dir / RUN_NAME
        train_ranks(run_file, proposal.ranks, words, record, threads=proposal.threads)
        return read_step_times(run_dir)


def _length(request: InitRequest, proposal: RunProposal, times: StepTimes) -> RunLength:
    train, val = (sum(one.structures(split) for one in proposal.manifests) for split in ("train", "val"))
    return run_length(hours=request.hours, ranks=proposal.ranks, train=train, val=val, times=times)


def _write(proposal: RunProposal) -> None:
    """Write the run file to a temporary file, check it as `hydrazero train` does, and rename it."""
    path = proposal.run_file
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as part:
            part.write_text(run_text(proposal), encoding="utf-8")
            check_run(load_run_config(part), resume=False)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}).") from error
