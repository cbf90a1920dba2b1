"""The work of `hydrazero screen`: load the model, open the sources, screen, and show progress and a summary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hydrazero.models import load_model
from hydrazero.models.inference.potential import Potential
from hydrazero.models.screening import ScreenPlan, ScreenSettings, ScreenSummary, Source, screen, sources_of
from hydrazero.models.screening.batch_loading import RankShare
from hydrazero.models.screening.prototypes import GeneratedSource
from hydrazero.models.screening.screener import expected_structures
from hydrazero.models.screening.settings import TOO_CLOSE
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.shards.launcher_variables import launcher_rank, launcher_ranks
from hydrazero.shards.manifest import file_sha256
from hydrazero.shards.readers.frames import FieldNames
from hydrazero.trainer.ranks.distributed import device
from hydrazero.trainer.records.run_log import progress_bar


@dataclass(frozen=True, kw_only=True)
class ScreenRequest:
    """The options of `hydrazero screen`."""

    model: Path
    """Exported model."""
    sources: tuple[Path, ...]
    """Files and shard folders."""
    out: Path
    """Parquet file, or folder of several."""
    generate: tuple[Path, ...]
    """TOML files that describe structures to generate."""
    tasks: tuple[str, ...]
    """Heads to use; empty: all."""
    with_forces: bool
    """Whether the first head predicts forces."""
    forces_of: tuple[str, ...]
    """Heads that predict forces too."""
    top: int | None
    """Number of structures to keep; None: all."""
    by: str
    """Expression of columns that ranks the structures; empty: the first head's interaction energy per atom."""
    relax: int
    """Maximum number of relaxation steps."""
    max_atoms: int
    """Larger structures are not computed."""
    bf16: bool
    """Whether the encoder's matrix products are in bfloat16."""
    config: Path | None
    """Conversion file that says how to read the sources."""
    format_name: str | None
    """Format of the sources; None: by their suffixes."""
    workers: int
    """Number of reading processes per rank."""
    batch_atoms: int | None
    """Number of atoms in a batch; None: chosen for the device."""


def screen_files(request: ScreenRequest, say: Callable[[str], None]) -> None:
    """Screen on this rank and say what came of it; raise HydrazeroError if no structure can be computed or ranked."""
    potential = load_model(request.model, device())
    potential.model.autocast = torch.bfloat16 if request.bf16 else None
    tasks = request.tasks or tuple(potential.tasks)
    # Forces show how far a relaxation has converged.
    forces = tuple(dict.fromkeys([*tasks[: request.with_forces or request.relax > 0], *request.forces_of]))
    settings = ScreenSettings(
        tasks=tasks,
        forces=forces,
        top=request.top,
        by=request.by,
        relax=request.relax,
        max_atoms=request.max_atoms,
    )
    plan = ScreenPlan(
        rank=launcher_rank(),
        ranks=launcher_ranks(),
        workers=request.workers,
        atoms=request.batch_atoms,
        model_id=f"{file_sha256(request.model)} bf16={request.bf16}",
    )
    sources = _sources(request, say if plan.rank == 0 else lambda _: None)
    summary = _with_progress(potential, sources, request.out, settings, plan)
    _report(summary, request.out, settings, plan, say)


def _sources(request: ScreenRequest, say: Callable[[str], None]) -> list[Source]:
    """Return what to screen, and say what is not read; raise ConfigError if there is nothing."""
    if not request.sources and not request.generate:
        raise ConfigError("name what to screen: shard folders, files, or --generate FILE.toml.")
    read = load_convert_settings(request.config, request.format_name).read_settings()
    unlabelled = {"energy": "", "forces": "", "stress": "", "virial": ""}  # a screen needs no labels
    fields = (read.fields if request.config else FieldNames()).model_copy(update=unlabelled)
    geometry = replace(read, fields=fields, require=(), targets={})
    return [*sources_of(request.sources, geometry, say), *map(GeneratedSource, request.generate)]


def _with_progress(
    potential: Potential, sources: list[Source], out: Path, settings: ScreenSettings, plan: ScreenPlan
) -> ScreenSummary:
    """Screen with a progress bar on the first rank."""
    if plan.rank:
        return screen(potential, sources, out, settings, plan)
    expected = expected_structures(sources, RankShare(ranks=plan.ranks))
    total = round(expected) if expected < float("inf") else None
    bar, advance = progress_bar("screening", total)
    with ExitStack() as shown:

        def count(structures: int) -> None:
            if not bar.live.is_started:  # only once all input has been checked
                shown.enter_context(bar)
            advance(structures)

        return screen(potential, sources, out, settings, plan, count)


def _report(
    summary: ScreenSummary, out: Path, settings: ScreenSettings, plan: ScreenPlan, say: Callable[[str], None]
) -> None:
    """Say what came of this rank's part and, on the rank that finishes last, of the whole screen."""
    if summary.was_complete:
        say(f"{out} is complete; rank {plan.rank} of {plan.ranks} had nothing to do.")
    elif summary.totals is not None:
        say(summary_text(out, summary, settings, plan.ranks))
        if sum(summary.totals["refused"].values()) == summary.totals["structures"]:
            raise HydrazeroError(
                f"no structure could be computed; the column 'reason' of {out} gives the reason for each."
            )
        _report_unranked(settings, summary.totals, say)
    elif summary.structures:
        done = f"rank {plan.rank} of {plan.ranks} has computed its {summary.structures:,} structures"
        say(f"{done}; the last rank writes {out}.")


def too_close_text(settings: ScreenSettings, counts: dict[str, int]) -> str:
    """Return for how many structures, by task, atoms are closer than in its data, and how a list leaves them out."""
    by_task = ", ".join(f"{count:,} ({task})" for task, count in counts.items())
    hint = ""
    if settings.top is not None and TOO_CLOSE not in settings.ranking:
        hint = f'; --by "({settings.ranking}) / (1 - {TOO_CLOSE}{next(iter(counts))})" leaves them out'
    marked = f"the columns '{TOO_CLOSE}TASK' mark them"
    return f"computed with atoms closer than in the training data: {by_task}; {marked}{hint}"


def _report_unranked(settings: ScreenSettings, totals: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say how many structures could not be ranked; raise ConfigError if none could be."""
    computed = totals["structures"] - sum(totals["refused"].values())
    if settings.top is None or totals["written"] >= min(settings.top, computed):
        return
    why = "columns are empty for heads that have not seen an element, and some results are not finite"
    if totals["written"] == 0:
        raise ConfigError(f"no structure has a value of '{settings.ranking}': {why}; rank by other columns.")
    say(f"not ranked, without a value of '{settings.ranking}': {computed - totals['written']:,} ({why})")


KIND_TEXTS = {"unseen": "that no head supports"}
"""Kind of a rejection -> its words in the summary, where they are not those of the kind itself."""


def summary_text(out: Path, summary: ScreenSummary, settings: ScreenSettings, ranks: int) -> str:
    """Return what a complete screen has computed, and how fast, as lines."""
    totals = summary.totals or {}
    refused = sum(totals["refused"].values())
    kept = "" if totals["written"] == totals["structures"] else f"; the {totals['written']:,} that rank lowest are kept"
    lines = [f"{out}: {totals['structures'] - refused:,} of {totals['structures']:,} structures computed{kept}"]
    if refused:
        kinds = ", ".join(
            f"{count:,} {KIND_TEXTS.get(kind, kind.replace('_', ' '))}"
            for kind, count in sorted(totals["refused"].items())
        )
        lines.append(f"{refused:,} not computed ({kinds}); the column 'reason' says why")
    if totals["too_close"]:
        lines.append(too_close_text(settings, totals["too_close"]))
    rate = summary.structures / max(summary.seconds, 1e-9)
    share = summary.model_seconds / max(summary.seconds - summary.start_seconds, 1e-9)
    lines.append(
        f"{'' if ranks == 1 else 'the last rank: '}{summary.structures:,} structures in {summary.seconds:.1f} s, "
        f"{rate:,.0f} structures/s; start-up took {summary.start_seconds:.1f} s, the model "
        f"{summary.model_seconds:.1f} s ({share:.0%} of the time after start-up)"
    )
    return "\n".join(lines)
