"""The settings of a trial: the run file of the search, the trial's values, and settings that make trials comparable.

Trials end after a time rather than a number of steps, and slow models train fewer steps in that time. With a schedule
that depends on the number of steps, trials would be compared at different points of their decay. All trials therefore
have a constant learning rate after the warm-up. Evaluations use the moving average of the weights (`train.average`),
which at a constant learning rate has much of the effect of a decay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.location import Location
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.search.space import WANTED_STRUCTURES, Value

ENDLESS = 1_000_000_000
"""Number of steps of a run that ends after a time."""
WARM_UP = "deepspeed.scheduler.params.warmup_num_steps"

BATCH_KEYS = ("structures", "atoms", "slots", "edges")
"""Keys of [batch] that are worked out from the wanted number of structures."""

BY_TIME = "trials end at a time, see search.seconds"
NEVER_REACHED = "weights change with the fraction of a run's steps, and trials end at a time"
SET_BY_SEARCH = {
    "tasks": "all trials have the same tasks",
    "run.out": "each trial has a folder of its own",
    "train.steps": BY_TIME,
    "train.max_hours": BY_TIME,
    "train.budget_seconds": BY_TIME,
    "train.patience": BY_TIME,
    "train.evaluate_every": "trials are evaluated at the rungs",
    "train.keep_best": "trials are compared by their errors at a rung",
    "deepspeed.scheduler": f"the learning rate is constant after a warm-up, of which {WARM_UP} can be varied",
    "batch.atoms": f"it is worked out from {WANTED_STRUCTURES}",
    "batch.slots": f"it is worked out from {WANTED_STRUCTURES}",
    "batch.edges": f"it is worked out from {WANTED_STRUCTURES}",
    "loss.final_weights": NEVER_REACHED,
    "loss.change_from": NEVER_REACHED,
    "loss.change_until": NEVER_REACHED,
}
"""Keys and tables that cannot be varied, with the reason."""


def trial_overrides(run_file: Path | str, values: Mapping[str, Value]) -> list[str]:
    """Return the values of a trial as overrides of the run file.

    If the values contain a number of structures in a batch, [batch] is worked out from it. Raise ConfigError for values
    that the run file cannot have, and ShardError for damaged shards.
    """
    own = [f"{key}={toml_value(value)}" for key, value in values.items() if key != WANTED_STRUCTURES]
    if WANTED_STRUCTURES not in values:
        return own
    config = load_run_config(run_file, own)
    folders = tuple(task.location for task in config.tasks)
    wanted = int(values[WANTED_STRUCTURES])
    shape = _proposed(folders, config.model.cutoff, config.data.temperature, wanted)
    return [*own, *(f"batch.{key}={getattr(shape, key)}" for key in BATCH_KEYS)]


def toml_value(value: Value) -> str:
    """Return a single value as TOML, in which it is written as in JSON."""
    return json.dumps(value, ensure_ascii=False)


@lru_cache(maxsize=64)
def _proposed(folders: tuple[Location, ...], cutoff: float, temperature: float, structures: int) -> BatchShape:
    from hydrazero.shards.stream.batch_proposal import demand_of, propose
    from hydrazero.shards.stream.stream import SplitReader, StreamSettings

    # The shape has no influence on the samples that are read.
    shape = BatchShape(structures=1, atoms=1, slots=ROW_SLOTS)
    settings = StreamSettings(folders=folders, cutoff=cutoff, shape=shape, temperature=temperature)
    reader = SplitReader(settings, "train")
    return propose(demand_of(reader), reader, structures)


def search_overrides(ds_config: Mapping[str, Any], out: Path, seconds: float) -> list[str]:
    """Return the overrides of all trials that train up to a rung at `seconds` of training.

    `ds_config` is the DeepSpeed JSON of the search's run file; all trials have its warm-up.
    """
    warm_up = int(ds_config.get("scheduler", {}).get("params", {}).get("warmup_num_steps", 0))
    fixed: dict[str, Any] = {
        "run.out": str(out),
        "train.steps": ENDLESS,
        "train.budget_seconds": seconds,
        "train.max_hours": 0,
        "train.patience": 0,
        "train.evaluate_every": ENDLESS,
        "train.keep_best": False,
        "train.keep_checkpoints": 1,
    }
    constant = f'{{type = "WarmupStableDecayLR", params = {{warmup_num_steps = {warm_up}, decay_share = 0}}}}'
    return [*(f"{key}={toml_value(value)}" for key, value in fixed.items()), f"deepspeed.scheduler={constant}"]
