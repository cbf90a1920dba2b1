"""Reading what `torch.save` has written without running code that its author may have put there.

A pickle names the classes and functions that are called when it is loaded. Only tensors, plain types and the classes
below are; a file that names anything else is an error. Runs can therefore be exchanged like data.
"""

from __future__ import annotations

import importlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from hydrazero.shards.errors import ConfigError

ALLOWED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "hydrazero.trainer.balance.adam.Moments",
)
"""Classes in checkpoints besides those that torch allows itself. None of them does more than hold values."""
READ_ERRORS = (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError)
"""Errors that torch raises for damaged files."""


def safe_load(path: Path | str, map_location: Any = "cpu") -> Any:
    """Return the content of a file of a checkpoint, memory-mapped, so that only what is used is read.

    Raises ConfigError if it is damaged, or if loading it would call anything but the classes in `ALLOWED`.
    """
    path = Path(path)
    try:
        mapped = zipfile.is_zipfile(path)
        named = get_unsafe_globals_in_checkpoint(str(path)) if mapped else ALLOWED
        if foreign := sorted(set(named) - set(ALLOWED)):
            raise ConfigError(
                f"{path} is not loaded, since that would call '{foreign[0]}', which no checkpoint of hydrazero needs; "
                "use a checkpoint from a run that you trust."
            )
        with safe_globals([_class(name) for name in named]):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        # The rest of what torch says is advice to load the file without protection.
        call = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        reason = f"that would call '{call[1]}'" if call else "it is damaged, or is no file of a checkpoint"
        raise ConfigError(f"{path} is not loaded, since {reason}; use one from a run that you trust.") from error
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} cannot be read ({reason}); use a checkpoint that is intact.") from error


def _class(name: str) -> Any:
    """Return an allowed class; DeepSpeed is imported only if a file holds its classes."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
