"""One rank of a training run: `deepspeed --num_gpus N --module hydrazero.trainer.train RUN.toml`, srun, or mpirun."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.trainer.config import RunConfig, deepspeed_config, load_run_config
from hydrazero.trainer.run_files import MODEL_FACTS_NAME, RUN_NAME, read_json, write_json

VERSIONED_PACKAGES = ("hydrazero", "torch", "deepspeed", "torch_geometric", "webdataset", "numpy", "ase", "vesin")

SMALLEST_SCALE = 1e-3
"""eV/Å or eV per atom; a label's root mean square below it is rounding or a constant, not a scale."""


def task_facts(config: RunConfig) -> list[Any]:
    """Collect the facts of a run's tasks from their manifests, checking shards and elements; raises HydrazeroError."""
    from hydrazero.models.atomistic import TaskFacts
    from hydrazero.shards.manifest import check_shard_files, read_manifest

    facts = []
    for task in config.tasks:
        if not Path(task.shards).is_dir():
            raise ConfigError(
                f"task '{task.name}' has no shards: {task.shards} does not exist; run 'hydrazero convert'."
            )
        manifest = read_manifest(task.shards)
        check_shard_files(manifest, task.shards)
        if manifest.structures("train") == 0:
            raise ConfigError(f"task '{task.name}': {task.shards} holds no training structures.")
        if manifest.max_atoms > config.batch.atoms:
            raise ConfigError(
                f"task '{task.name}' has one of {manifest.max_atoms} atoms, a batch holds {config.batch.atoms}: "
                f"set batch.atoms to at least {manifest.max_atoms}."
            )
        label_scales = [manifest.labels[n].rms for n in ("forces", "energy_residual_per_atom") if n in manifest.labels]
        facts.append(
            TaskFacts(
                name=task.name,
                reference_energies=manifest.reference_energies,
                # Labels that vanish by symmetry are no scale; with none left, eV and Å do.
                scale=next((scale for scale in label_scales if scale > SMALLEST_SCALE), 1.0),
                elements=manifest.trained_elements,
                fidelity=manifest.source.get("method", ""),
                has_forces="forces" in manifest.labels,
            )
        )
    return facts


def check_run(config: RunConfig, resume: bool, ranks: int) -> None:
    """Check everything that can be checked before ranks start; raises HydrazeroError."""
    deepspeed_config(config)
    task_facts(config)
    run_dir = Path(config.run.out)
    if resume:
        from hydrazero.trainer.checkpoint import latest_checkpoint

        latest_checkpoint(run_dir)
        before = read_json(run_dir / RUN_NAME)["ranks"]
        if before != ranks:
            raise ConfigError(f"{run_dir} was trained with {before} ranks and cannot go on with {ranks}; use {before}.")
    elif (run_dir / RUN_NAME).exists():
        raise ConfigError(f"run folder {run_dir} holds a run already; use --resume to go on with it, or set run.out.")


def run_record(config: RunConfig, ds_config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Return what `run.json` holds: configuration, versions, command, ranks and start."""
    versions = {}
    for name in VERSIONED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        **asdict(config),
        "deepspeed": ds_config,
        "versions": versions,
        "command": " ".join(["hydrazero train", *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]),
        "ranks": ranks,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def run_rank(config: RunConfig, resume: bool) -> None:
    """Train on this rank; raises HydrazeroError on every rank that a fault concerns."""
    import torch

    from hydrazero.models.atomistic import AtomisticModel
    from hydrazero.shards.stream import StreamSettings, TrainStream
    from hydrazero.trainer import distributed
    from hydrazero.trainer.checkpoint import load_checkpoint
    from hydrazero.trainer.console import RunLog
    from hydrazero.trainer.engine import make_engine
    from hydrazero.trainer.loop import Trainer
    from hydrazero.trainer.run_files import truncate_metrics

    distributed.start_ranks()
    try:
        check_run(config, resume, distributed.ranks())
        distributed.wait_for_all()  # before rank 0 makes the folder that the others have just seen to be absent
        ds_config, facts = deepspeed_config(config), task_facts(config)
        torch.manual_seed(config.run.seed)
        model = AtomisticModel(config.model.settings(), facts)
        run_dir = Path(config.run.out)
        if distributed.rank() == 0 and not resume:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json(run_dir / RUN_NAME, run_record(config, ds_config, distributed.ranks()))
            write_json(run_dir / MODEL_FACTS_NAME, model.facts())
        described = model.facts()
        engine = make_engine(model.to(distributed.device()), ds_config)
        place: dict[str, Any] = {"step": 0, "stream": None}
        if resume:
            check_same_model(run_dir, described)
            place = load_checkpoint(engine, run_dir)
            if distributed.rank() == 0:
                truncate_metrics(run_dir, place["step"])
        settings = StreamSettings(
            folders=tuple(task.shards for task in config.tasks),
            cutoff=config.model.cutoff,
            shape=config.batch,
            seed=config.run.seed,
            temperature=config.data.temperature,
            workers=config.data.workers,
        )
        stream = TrainStream(settings, distributed.rank(), distributed.ranks(), place["stream"])
        with RunLog(run_dir, config.train.steps, place["step"]) as log:
            Trainer(config, engine, stream, log, place["step"]).train()
        distributed.wait_for_all()  # a rank that left early would tear down connections that others still use
    finally:
        distributed.stop_ranks()


def check_same_model(run_dir: Path, described: dict[str, Any]) -> None:
    """Raise ConfigError unless the run file still describes the model and tasks that the run was started with."""
    if read_json(run_dir / MODEL_FACTS_NAME) != json.loads(json.dumps(described)):
        raise ConfigError(
            f"{run_dir} was started with another model, other tasks or other shards than the run file names now; "
            "resume with the same ones, or start a new run."
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value of the run file."
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the run.")
@click.option("--local_rank", "--local-rank", default=None, type=int, hidden=True)  # the launcher passes it to everyone
def main(run_file: Path, overrides: Sequence[str], resume: bool, local_rank: int | None) -> None:
    """Train one rank of RUN_FILE; start it with deepspeed, srun, mpirun, or alone."""
    from hydrazero.trainer.distributed import exit_rank

    try:
        run_rank(load_run_config(run_file, overrides), resume)
    except HydrazeroError as error:
        # The process group is gone by now, its variables are not.
        if os.environ.get("RANK", "0") == "0" or not error.on_every_rank:
            click.echo(f"Error: {error}", err=True)
        exit_rank(1)
    exit_rank(0)


if __name__ == "__main__":
    main()
