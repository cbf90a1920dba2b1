"""What a trial is trained with: the run file of the search, its own values, and what makes trials comparable.

Trials end at a time, not at a step, and slow models do fewer steps in it. A schedule that knows the number of steps
would let them be compared at different places of their decay, so the learning rate of all is constant after the
warm-up; what an evaluation sees is the moving average of the weights (`train.average`), which at a constant rate does
much of what a decay would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.search.space import WANTED_STRUCTURES, Value

ENDLESS = 1_000_000_000
"""Steps, of a run that ends at a time."""
WARM_UP = "deepspeed.scheduler.params.warmup_num_steps"

BY_TIME = "trials end at a time, see search.seconds"
NEVER_REACHED = "weights change by the share of a run's steps, and trials end at a time"
SET_BY_SEARCH = {
    "tasks": "all trials have the same tasks",
    "run.out": "each trial has a folder of its own",
    "train.steps": BY_TIME,
    "train.max_hours": BY_TIME,
    "train.budget_seconds": BY_TIME,
    "train.patience": BY_TIME,
    "train.evaluate_every": "trials are evaluated at the rungs",
    "train.keep_best": "trials are compared by what they have at a rung",
    "deepspeed.scheduler": f"the learning rate is constant after a warm-up, of which {WARM_UP} can be varied",
    "batch.atoms": f"it is worked out from {WANTED_STRUCTURES}",
    "batch.slots": f"it is worked out from {WANTED_STRUCTURES}",
    "batch.edges": f"it is worked out from {WANTED_STRUCTURES}",
    "loss.final_weights": NEVER_REACHED,
    "loss.change_from": NEVER_REACHED,
    "loss.change_until": NEVER_REACHED,
}
"""Keys, or tables, that cannot be varied, and why."""


def trial_overrides(run_file: Path | str, values: Mapping[str, Value]) -> list[str]:
    """Return the values of a trial as overrides of the run file, its [batch] worked out where they say for how many.

    Raises ConfigError for values that the run file cannot have, ShardError for damaged shards.
    """
    own = [f"{key}={_toml(value)}" for key, value in values.items() if key != WANTED_STRUCTURES]
    if WANTED_STRUCTURES not in values:
        return own
    config = load_run_config(run_file, own)
    folders = tuple(task.shards for task in config.tasks)
    wanted = int(values[WANTED_STRUCTURES])
    shape = _proposed(folders, config.model.cutoff, config.data.temperature, wanted)
    return [*own, *(f"batch.{key}={getattr(shape, key)}" for key in ("structures", "atoms", "slots", "edges"))]


def _toml(value: Value) -> str:
    """Write a value as TOML, which for single values JSON is."""
    return json.dumps(value, ensure_ascii=False)


@lru_cache(maxsize=64)
def _proposed(folders: tuple[str, ...], cutoff: float, temperature: float, structures: int) -> BatchShape:
    from hydrazero.shards.stream.batch_proposal import demand_of, propose
    from hydrazero.shards.stream.stream import SplitReader, StreamSettings

    # The shape plays no part in reading samples.
    shape = BatchShape(structures=1, atoms=1, slots=ROW_SLOTS)
    settings = StreamSettings(folders=folders, cutoff=cutoff, shape=shape, temperature=temperature)
    reader = SplitReader(settings, "train")
    return propose(demand_of(reader), reader, structures)


def search_overrides(ds_config: Mapping[str, Any], out: Path, seconds: float) -> list[str]:
    """Return the overrides that all trials have in common, up to a rung at `seconds` of training.

    `ds_config` is the DeepSpeed JSON of the search's run file, whose warm-up all trials have.
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
    return [*(f"{key}={_toml(value)}" for key, value in fixed.items()), f"deepspeed.scheduler={constant}"]
