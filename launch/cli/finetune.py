"""The command `finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hydrazero.launch.cli.options import FOLDER, ranks_option, set_option
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.text.foreign_text import echo


@click.command("finetune")
@click.argument("model", metavar="MODEL", type=FOLDER)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--out", required=True, metavar="RUN", type=FOLDER, help="New run folder.")
@click.option(
    "--method",
    default="full",
    show_default=True,
    metavar="NAME",
    help="full: train all weights; heads: train the new head only; lora: train the head and low-rank changes of the "
    "encoder; layerwise: train all weights, with lower learning rates far from the head.",
)
@click.option(
    "--init-head",
    default="nearest",
    show_default=True,
    metavar="NAME",
    help="Initial weights of the new head. nearest: the head with the lowest force error on the new structures; the "
    "name of a head; mean: the mean of all heads; new: random weights.",
)
@click.option(
    "--replay", metavar="FRACTION", type=float, help="Fraction of structures of old tasks in the training batches."
)
@click.option(
    "--replay-data",
    "old",
    multiple=True,
    metavar="DIR",
    type=FOLDER,
    help="Shards of an old task, used for --replay and to measure how much is forgotten. May be given several times.",
)
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(1),
    help="Maximum number of steps.  [default: chosen by the number of structures]",
)
@click.option("--lr", "rate", metavar="X", type=float, help="Learning rate.  [default: chosen by the method]")
@ranks_option
@set_option
def finetune_command(out: Path, **options: Any) -> None:
    """Fine-tune a trained model on the shards of a new task.

    MODEL is an exported model or a run folder; DIR holds the shards. All settings are written to RUN/run.toml, an
    ordinary run file, which is then trained as by 'hydrazero train'.
    """
    from hydrazero.trainer.finetune.command import finetune
    from hydrazero.trainer.finetune.plan import FinetuneRequest

    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another name.")
    finetune(FinetuneRequest(out=out, **options), echo)
