"""The command `finetune`."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.shards.errors import ConfigError

FOLDER = click.Path(path_type=Path)


@click.command("finetune")
@click.argument("model", type=FOLDER)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--out", required=True, metavar="RUN", type=FOLDER, help="New run folder.")
@click.option(
    "--method",
    default="full",
    show_default=True,
    metavar="NAME",
    help="full: all weights; heads: the new head alone; lora: low-rank changes of the encoder and the head; layerwise: "
    "all, the slower the farther from the head.",
)
@click.option(
    "--init-head",
    default="nearest",
    show_default=True,
    metavar="NAME",
    help="What the new head begins as: the head of lowest force error on the new structures (nearest), a head by name, "
    "the mean of all, or new for first weights.",
)
@click.option("--replay", metavar="FRACTION", type=float, help="Of structures of old tasks in batches.")
@click.option(
    "--replay-data",
    "old",
    multiple=True,
    metavar="DIR",
    type=FOLDER,
    help="Shards of an old task, to measure what is forgotten, and to replay; may be given several times.",
)
@click.option("--steps", metavar="N", type=click.IntRange(1), help="Most steps; by the structures if not given.")
@click.option("--lr", "rate", metavar="X", type=float, help="Learning rate; by the method if not given.")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1), help="Processes on this machine.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value of the run file."
)
def finetune_command(
    model: Path,
    folder: Path,
    out: Path,
    method: str,
    init_head: str,
    replay: float | None,
    old: tuple[Path, ...],
    steps: int | None,
    rate: float | None,
    ranks: int,
    overrides: tuple[str, ...],
) -> None:
    """Fine-tune MODEL, an exported model or a run folder, on the shards in DIR.

    What it works out goes into RUN/run.toml, an ordinary run file; it is trained as by 'hydrazero train'.
    """
    from hydrazero.trainer.finetune.command import Request, finetune

    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another name.")
    request = Request(
        model=model,
        folder=folder,
        out=out,
        method=method,
        init_head=init_head,
        replay=replay,
        old=old,
        steps=steps,
        rate=rate,
        ranks=ranks,
        overrides=overrides,
    )
    finetune(request, click.echo)
