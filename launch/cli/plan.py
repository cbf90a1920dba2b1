"""The command `plan`: an estimate of what a run needs on a site, before anything is submitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hydrazero.launch.cli.options import FOLDER, NODES, RANKS_PER_NODE, SITE, set_option
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.text.foreign_text import echo

if TYPE_CHECKING:
    from hydrazero.launch.plan.request import PlanSettings
    from hydrazero.trainer.config.run_file import RunConfig

BENCH = Path("runs/bench.json")


@click.command("plan")
@click.argument("run_file", metavar="RUN.toml", type=FOLDER)
@SITE
@NODES
@RANKS_PER_NODE
@click.option(
    "--global-batch",
    default=0,
    type=click.IntRange(0),
    metavar="N",
    help="Number of structures in a step of all ranks together; determines how many batches each rank accumulates.  "
    "[default: by the run file]",
)
@click.option(
    "--hours",
    default=0.0,
    type=click.FloatRange(0),
    metavar="H",
    help="Time limit of a job.  [default: the longest that the site allows]",
)
@click.option(
    "--bench",
    metavar="FILE",
    type=FOLDER,
    help=f"Results of `make bench`, from which the speed of a step is estimated.  [default: {BENCH} if it is suitable]",
)
@click.option("--out", metavar="DIR", type=FOLDER, help="Folder for plan.json and plan.png.  [default: the run folder]")
@set_option
def plan_command(
    run_file: Path, site_name: str, bench: Path | None, out: Path | None, overrides: tuple[str, ...], **size: Any
) -> None:
    """Estimate memory, time and scaling of a run on a cluster.

    The estimate also covers network traffic, files and node-hours. Shards that are not converted yet are taken from
    presets and from the section [plan] of the run file.
    """
    from hydrazero.launch.job.job import check_size
    from hydrazero.launch.job.site_file import load_site
    from hydrazero.launch.plan.compute import default_bench, named_bench
    from hydrazero.launch.plan.plan import plan
    from hydrazero.launch.plan.request import PlanRequest
    from hydrazero.launch.plan.tables import tables
    from hydrazero.trainer.config.run_file import load_run_config
    from hydrazero.trainer.records.progress_line import wide_console

    site = load_site(site_name)
    check_size(site, size["nodes"], size["hours"], "")
    size["ranks_per_node"] = size["ranks_per_node"] or site.nodes.dies
    request = PlanRequest(
        settings=plan_settings(load_run_config(run_file, overrides)),
        site=site,
        bench=default_bench(BENCH) if bench is None else named_bench(bench),
        **size,
    )
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is not a folder; name another one.")
    document = plan(request)
    console = wide_console(stderr=False)
    for table in tables(document):
        console.print(table)
    _write(document, Path(document["run"]) if out is None else out)


def plan_settings(config: RunConfig) -> PlanSettings:
    """Return the settings of a run file on which a plan depends; raise ConfigError for a faulty DeepSpeed JSON."""
    from hydrazero.launch.plan.request import PlanSettings
    from hydrazero.trainer.config.deepspeed_json import deepspeed_config

    return PlanSettings(
        out=config.run.out,
        tasks=config.tasks,
        shares=config.shares,
        temperature=config.data.temperature,
        workers=config.data.workers,
        model=config.model,
        batch=config.batch,
        balance_every=config.balance.every,
        steps=config.train.steps,
        compiled=config.train.compile,
        average=bool(config.train.average),
        ds_config=deepspeed_config(config.deepspeed, config.train.steps),
        assumed=config.plan,
    )


def _write(document: dict[str, Any], folder: Path) -> None:
    """Write plan.json and plan.png; raise ConfigError if the folder cannot be written."""
    from hydrazero.launch.plan.picture import draw
    from hydrazero.shards.files import write_text

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "plan.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
        draw(document, folder / "plan.png")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); name another with --out.") from error
    echo(f"{folder / 'plan.json'}\n{folder / 'plan.png'}")
