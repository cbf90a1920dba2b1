"""The command `screen`, and what launchers start: `python -m hydrazero.launch.cli.screen`, a rank of it."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hydrazero.shards.errors import ConfigError, HydrazeroError

if TYPE_CHECKING:
    from hydrazero.models.inference.potential import Potential
    from hydrazero.models.screening import ScreenPlan, ScreenSettings, ScreenSummary, Source

FOLDER = click.Path(path_type=Path)
INTERRUPTED = 130
"""Exit status of what Ctrl-C has ended, as shells have it."""


def task_list(text: str | None) -> list[str] | None:
    """Split 'a,b' into names; raises ConfigError if there is none."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--tasks '{text}' names no task; give names, or leave it out for all tasks.")
    return names


@click.command("screen")
@click.argument("model", type=FOLDER)
@click.argument("sources", metavar="[SOURCE]...", nargs=-1, type=FOLDER)
@click.option(
    "--out", required=True, metavar="DIR|FILE.parquet", type=FOLDER, help="One file, or a new folder for several."
)
@click.option("--generate", multiple=True, metavar="FILE.toml", type=FOLDER, help="Prototypes x elements x strains.")
@click.option("--tasks", metavar="A,B", help="Heads to use; all by default. The first one ranks.")
@click.option("--forces", "with_forces", is_flag=True, help="Also forces, by the first head.")
@click.option("--forces-of", metavar="A,B", help="Also forces, by these heads.")
@click.option("--top", type=click.IntRange(1), metavar="K", help="Keep only the K structures that rank lowest.")
@click.option("--by", default="", metavar="EXPR", help="What ranks, of columns: 'abs(energy_a - energy_b) / atoms'.")
@click.option("--relax", default=0, metavar="STEPS", type=click.IntRange(0), help="Relax first, with the first head.")
@click.option(
    "--max-atoms", default=10_000, show_default=True, type=click.IntRange(1), help="Larger ones are not computed."
)
@click.option("--bf16", is_flag=True, help="The encoder's matrix products in bfloat16: faster, energies to about 1%.")
@click.option("--config", metavar="FILE", type=FOLDER, help="TOML of a conversion: how to read the sources.")
@click.option("--format", "format_name", metavar="NAME", help="Of the sources; guessed from their suffixes.")
@click.option("--ranks", type=click.IntRange(1), metavar="N", help="Processes on this machine, each with its share.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(0), help="Processes per rank that read.")
@click.option("--batch-atoms", type=click.IntRange(1), metavar="N", help="Atoms in a batch; by the device.")
@click.option("--launched-by", default=None, type=int, hidden=True)  # the process id of `hydrazero screen --ranks`
@click.option("--local_rank", "--local-rank", default=None, type=int, hidden=True)  # DeepSpeed's launcher passes it
def screen_command(
    model: Path,
    sources: tuple[Path, ...],
    out: Path,
    generate: tuple[Path, ...],
    tasks: str | None,
    with_forces: bool,
    forces_of: str | None,
    top: int | None,
    by: str,
    relax: int,
    max_atoms: int,
    bf16: bool,
    config: Path | None,
    format_name: str | None,
    ranks: int | None,
    workers: int,
    batch_atoms: int | None,
    launched_by: int | None,
    local_rank: int | None,
) -> None:
    """Predict every structure of files or shard folders with a model's heads.

    A screen that was killed goes on when it is started again. Under a launcher (deepspeed, srun, mpirun) each rank
    takes its share.
    """
    import torch

    from hydrazero.models import load_model
    from hydrazero.models.screening import ScreenPlan, ScreenSettings
    from hydrazero.shards.manifest import file_sha256
    from hydrazero.trainer.ranks.distributed import device, launcher_rank, launcher_ranks

    if ranks is not None and ranks > 1:
        _start_ranks(ranks)
        return
    if launched_by is not None:
        from hydrazero.trainer.ranks.processes import end_with

        end_with(launched_by)
    potential = load_model(model, device())
    potential.model.autocast = torch.bfloat16 if bf16 else None
    chosen = tuple(task_list(tasks) or potential.tasks)
    # How far a relaxation has come shows in its forces.
    forces = tuple(dict.fromkeys([*chosen[: with_forces or relax > 0], *(task_list(forces_of) or ())]))
    settings = ScreenSettings(tasks=chosen, forces=forces, top=top, by=by, relax=relax, max_atoms=max_atoms)
    plan = ScreenPlan(
        rank=launcher_rank(),
        ranks=launcher_ranks(),
        workers=workers,
        atoms=batch_atoms,
        model_id=f"{file_sha256(model)} bf16={bf16}",
    )
    found = _sources(sources, generate, config, format_name)
    summary = _with_progress(potential, found, out, settings, plan)
    if summary.was_complete:
        click.echo(f"{out} is complete; rank {plan.rank} of {plan.ranks} had nothing to do.")
    elif summary.whole is not None:
        click.echo(said(out, summary, plan.ranks))
        if sum(summary.whole["refused"].values()) == summary.whole["structures"]:
            raise HydrazeroError(f"no structure could be computed; the column 'reason' of {out} says why of each.")
        _tell_unranked(settings, summary.whole)
    elif summary.structures:
        done = f"rank {plan.rank} of {plan.ranks} has done its {summary.structures:,} structures"
        click.echo(f"{done}; the last one makes {out}.")


def _tell_unranked(settings: ScreenSettings, whole: dict[str, Any]) -> None:
    """Say how many structures could not be ranked; raises ConfigError if none could be."""
    computed = whole["structures"] - sum(whole["refused"].values())
    if settings.top is None or whole["written"] >= min(settings.top, computed):
        return
    why = "columns of a head that has not seen an element are empty, and not every result is a number"
    if whole["written"] == 0:
        raise ConfigError(f"no structure has a value of '{settings.ranking}': {why}; rank by other columns.")
    click.echo(f"{computed - whole['written']:,} without a value of '{settings.ranking}': {why}")


def _sources(
    paths: tuple[Path, ...], specs: tuple[Path, ...], config: Path | None, format_name: str | None
) -> list[Source]:
    """What to screen; raises ConfigError if there is nothing."""
    from dataclasses import replace

    from hydrazero.models.screening import sources_of
    from hydrazero.models.screening.generated import GeneratedSource
    from hydrazero.shards.convert.settings import load_convert_settings
    from hydrazero.shards.readers.frames import FieldNames

    if not paths and not specs:
        raise ConfigError("name what to screen: shard folders, files, or --generate FILE.toml.")
    read = load_convert_settings(config, format_name).read_settings()
    unlabelled = {"energy": "", "forces": "", "stress": "", "virial": ""}  # labels do not matter to a screen
    names = (read.fields if config else FieldNames()).model_copy(update=unlabelled)
    geometry = replace(read, fields=names, require=())
    return [*sources_of(paths, replace(geometry, targets={})), *map(GeneratedSource, specs)]


def _with_progress(
    potential: Potential, sources: list[Source], out: Path, settings: ScreenSettings, plan: ScreenPlan
) -> ScreenSummary:
    from hydrazero.models.screening import screen
    from hydrazero.models.screening.reader import Share
    from hydrazero.models.screening.run import structures_of
    from hydrazero.trainer.records.run_log import progress_bar

    if plan.rank:
        return screen(potential, sources, out, settings, plan)
    expected = structures_of(sources, Share(ranks=plan.ranks))
    total = round(expected) if expected < float("inf") else None
    bar, advance = progress_bar("screening", total)
    with ExitStack() as shown:

        def count(structures: int) -> None:
            if not bar.live.is_started:  # not before all is known to be right
                shown.enter_context(bar)
            advance(structures)

        return screen(potential, sources, out, settings, plan, count)


def said(out: Path, summary: ScreenSummary, ranks: int) -> str:
    """Tell what a screen has come to."""
    whole = summary.whole or {}
    refused = sum(whole["refused"].values())
    kept = "" if whole["written"] == whole["structures"] else f", {whole['written']:,} kept that rank lowest"
    lines = [f"{out}: {whole['structures'] - refused:,} of {whole['structures']:,} structures computed{kept}"]
    if refused:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(whole["refused"].items()))
        lines.append(f"{refused:,} not computed ({kinds}): see the column 'reason'")
    rate = summary.structures / max(summary.seconds, 1e-9)
    share = summary.model_seconds / max(summary.seconds - summary.start_seconds, 1e-9)
    lines.append(
        f"{'' if ranks == 1 else 'the last rank: '}{summary.structures:,} in {summary.seconds:.1f} s, {rate:,.0f} "
        f"structures/s; {summary.start_seconds:.1f} s to start, the model {summary.model_seconds:.1f} s, {share:.0%} "
        "of the rest"
    )
    return "\n".join(lines)


def _start_ranks(ranks: int) -> None:
    """Start this very command as several ranks; raises ConfigError if one of them fails."""
    from hydrazero.trainer.ranks.launcher import Ranks

    words = sys.argv[2:] if sys.argv[1:2] == ["screen"] else sys.argv[1:]
    command = [
        sys.executable,
        "-m",
        "hydrazero.launch.cli.screen",
        f"--launched-by={os.getpid()}",
        *without_ranks(words),
    ]
    with Ranks(command, ranks) as running:
        outcome = running.wait()
    if running.interrupted:
        raise KeyboardInterrupt
    if outcome.status == 1:
        raise SystemExit(1)
    if outcome.status:
        raise HydrazeroError(f"{outcome.reason}; the same command goes on where it was.")


def without_ranks(words: list[str]) -> list[str]:
    """Return a command line without `--ranks N`."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--ranks" and not word.startswith("--ranks="):
            kept.append(word)
        skip = word == "--ranks"
    return kept


def main() -> None:
    """Screen as one rank; errors of users are one sentence."""
    try:
        screen_command(standalone_mode=False)
    except HydrazeroError as error:
        click.echo(f"Error: {error}", err=True)
        sys.stdout.flush()
        os._exit(error.exit_status)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.stdout.flush()
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
