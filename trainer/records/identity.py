"""The identity of a run: a unique identifier, and the facts of its model, which its checkpoints repeat.

A checkpoint that was put into the folder of another run, or a `model.json` that was changed after training, would
otherwise be exported with the errors of another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, RUN_NAME, read_run_json

RUN_ID = "run_id"
"""Key of the identifier of a run in `run.json` and in its checkpoints."""
FACTS = "facts_sha256"
"""Key of the digest of `model.json` in a checkpoint."""


def new_run_id() -> str:
    """Return the identifier of a run that starts now, which no other run has."""
    return uuid4().hex


def identity_of(run_dir: Path) -> dict[str, str | None]:
    """Return the identifier and the digest that the checkpoints of a run repeat; None where an older run lacks them."""
    found: dict[str, str | None] = {RUN_ID: None, FACTS: None}
    if (run_dir / RUN_NAME).exists():
        found[RUN_ID] = read_run_json(run_dir, RUN_NAME).get(RUN_ID)
    if (run_dir / MODEL_FACTS_NAME).exists():
        text = json.dumps(read_run_json(run_dir, MODEL_FACTS_NAME), sort_keys=True, separators=(",", ":"))
        found[FACTS] = hashlib.sha256(text.encode()).hexdigest()
    return found


def check_identity(run_dir: Path, folder: Path, state: Mapping[str, Any]) -> None:
    """Raise ConfigError if a checkpoint, of which `state` is known, belongs to another run or another model.

    Checkpoints of earlier versions do not name their run, and cannot be checked.
    """
    here = identity_of(run_dir)
    if here[RUN_ID] != state.get(RUN_ID):
        raise ConfigError(
            f"checkpoint {folder} was written by another run than the one in {run_dir / RUN_NAME}; put back the "
            "checkpoints and the files of one run."
        )
    if state.get(FACTS) != here[FACTS] and (state.get(FACTS) is not None or here[RUN_ID] is not None):
        raise ConfigError(
            f"{run_dir / MODEL_FACTS_NAME} is not the one with which checkpoint {folder} was written, so the model "
            "would be another one; restore it from a copy of the run."
        )
