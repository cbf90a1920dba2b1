"""A fine-tuned model with the heads of the model that it started from, on the encoder as it is now."""

from __future__ import annotations

from pathlib import Path

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.model_file import with_heads_of
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.start_weights import read_start
from hydrazero.trainer.records.run_record import read_record


def with_old_heads(model: AtomisticModel, run_dir: Path) -> AtomisticModel:
    """Return a run's model with the heads of its start that the run has not trained; raises HydrazeroError.

    They are as they were; the encoder below them is what the run has made of it.
    """
    source = read_record(run_dir).get("run", {}).get("start_from", "")
    if not source:
        raise ConfigError(f"{run_dir} did not start from another model: there are no old heads; leave out --old-heads.")
    return with_heads_of(model, read_start(source))
