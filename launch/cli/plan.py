"""The command `plan`: what a run will take on a site, before anything is submitted."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hydrazero.shards.errors import ConfigError

FOLDER = click.Path(path_type=Path)
BENCH = Path("runs/bench.json")


@click.command("plan")
@click.argument("run_file", metavar="RUN.toml", type=FOLDER)
@click.option("--site", "site_name", required=True, metavar="NAME|FILE.toml", help="Where it is to run.")
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1))
@click.option("--ranks-per-node", type=click.IntRange(1), help="[default: one for each of a node's dies]")
@click.option(
    "--global-batch",
    default=0,
    type=click.IntRange(0),
    help="Structures in a step; gives the batches that each rank adds up.  [default: by the run file]",
)
@click.option("--hours", default=0.0, type=click.FloatRange(0), help="Time of a job.  [default: the site's most]")
@click.option(
    "--bench", type=FOLDER, help=f"Rows of `make bench` that say how fast steps are.  [default: {BENCH} if it has them]"
)
@click.option("--out", type=FOLDER, help="Folder for plan.json and plan.png.  [default: the run's]")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value of the run file."
)
def plan_command(
    run_file: Path,
    site_name: str,
    nodes: int,
    ranks_per_node: int | None,
    global_batch: int,
    hours: float,
    bench: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Say what RUN.toml will take on a site: memory, traffic, time, scaling, files, node-hours.

    Shards need not be there: what is not converted yet is taken from presets and from [plan] in the run file.
    """
    from hydrazero.launch.job.job import check_size
    from hydrazero.launch.job.site_file import load_site
    from hydrazero.launch.plan.compute import default_bench, named_bench
    from hydrazero.launch.plan.picture import draw
    from hydrazero.launch.plan.plan import plan
    from hydrazero.launch.plan.request import Asked
    from hydrazero.launch.plan.tables import tables
    from hydrazero.trainer.config.run_file import load_run_config
    from hydrazero.trainer.records.progress_line import wide_console
    from hydrazero.trainer.records.run_files import write_text

    site = load_site(site_name)
    check_size(site, nodes, hours, "")
    asked = Asked(
        config=load_run_config(run_file, overrides),
        site=site,
        nodes=nodes,
        ranks_per_node=site.nodes.dies if ranks_per_node is None else ranks_per_node,
        global_batch=global_batch,
        hours=hours,
        bench=default_bench(BENCH) if bench is None else named_bench(bench),
    )
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is no folder; name another one.")
    document = plan(asked)
    console = wide_console(stderr=False)
    for table in tables(document):
        console.print(table)
    folder = Path(document["run"]) if out is None else out

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "plan.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
        draw(document, folder / "plan.png")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); name another with --out.") from error
    click.echo(f"{folder / 'plan.json'}\n{folder / 'plan.png'}")
