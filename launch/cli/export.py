"""The commands `export` and `package`."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.launch.cli.options import FOLDER, task_list
from hydrazero.shards.text.foreign_text import echo


@click.command("export")
@click.argument("run_dir", metavar="RUN", type=FOLDER)
@click.option("--out", required=True, metavar="MODEL.safetensors", type=FOLDER, help="File to write.")
@click.option("--tasks", metavar="A,B", help="Heads to export.  [default: all]")
@click.option(
    "--dtype", default="float32", show_default=True, metavar="NAME", help="Number format: float32, bfloat16 or float64."
)
@click.option(
    "--old-heads",
    is_flag=True,
    help="After fine-tuning: also export the heads of the original model that were not trained.",
)
def export_command(run_dir: Path, out: Path, tasks: str | None, dtype: str, old_heads: bool) -> None:
    """Write the best model of a run as one safetensors file.

    The best model is that of the checkpoint with the lowest validation loss. The file contains a model card, which
    'hydrazero inspect' shows. The card lists test errors if 'hydrazero evaluate' has been run before.
    """
    from hydrazero.trainer.evaluation.export import export_run

    model = export_run(run_dir, out, task_list(tasks), dtype, old_heads=old_heads)
    echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB, tasks {', '.join(task.name for task in model.tasks)}")


@click.command("package")
@click.argument("model", metavar="MODEL", type=FOLDER)
@click.option("--task", required=True, metavar="NAME", help="Head to compile.")
@click.option("--out", required=True, metavar="FILE.pt2", type=FOLDER, help="File to write.")
def package_command(model: Path, task: str, out: Path) -> None:
    """Compile one head of a model for PyTorch without hydrazero.

    The compilation takes one to two minutes. The file works on this type of processor with this version of PyTorch.
    """
    from hydrazero.models.inference.aot_package import write_package
    from hydrazero.models.inference.model_file import read_card, read_model, with_tasks

    write_package(with_tasks(read_model(model), [task]), out, read_card(model))
    echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB, task {task}")
