"""A fine-tuned model that keeps the heads of the model from which it started."""

from __future__ import annotations

from pathlib import Path

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.model_file import with_heads_of
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.model_of_run import read_run_or_model
from hydrazero.trainer.records.run_record import read_record


def with_old_heads(model: AtomisticModel, run_dir: Path) -> AtomisticModel:
    """Return a run's model with those heads of the model it started from that the run has not trained.

    The heads are unchanged, while the encoder below them has been trained further. Raises HydrazeroError if the run did
    not start from another model, or if that model cannot be read.
    """
    source = read_record(run_dir).get("run", {}).get("start_from", "")
    if not source:
        raise ConfigError(f"{run_dir} did not start from another model, so it has no old heads; leave out --old-heads.")
    return with_heads_of(model, read_run_or_model(source))
