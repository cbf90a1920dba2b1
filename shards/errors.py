"""Errors for users: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


class HydrazeroError(ValueError):
    """Base of every error that the command line prints as one sentence instead of a traceback."""

    on_every_rank = True
    """Whether all ranks of a run raise the error together; False if one rank alone meets it, such as in its data."""
    exit_status = 1
    """Exit status of a rank that ends with the error; 1 means that another attempt would fail in the same way."""


class StructureError(HydrazeroError):
    """A structure cannot be used; `reason` is a short fixed word by which bad frames are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[StructureError], tuple[str, str]]:
        """Keep both arguments when the error is passed between processes."""
        return type(self), (self.reason, str(self))


class SourceError(HydrazeroError):
    """A source file cannot be read, or settings do not fit it."""


class ShardError(HydrazeroError):
    """A shard or manifest is missing, damaged, of a newer format, or contradicts another one."""


class ConfigError(HydrazeroError):
    """A run file, a DeepSpeed JSON or a value on the command line cannot be used."""


class CheckpointError(HydrazeroError):
    """A run has ended without the checkpoint that it should have written."""


class ModelFileError(HydrazeroError):
    """An exported model cannot be read, or lacks what is requested of it."""


def did_you_mean(wrong: str, known: list[str]) -> str:
    """Return ' (did you mean X?)' with the closest known name, or a list of the known names if none is close."""
    from difflib import get_close_matches

    close = get_close_matches(wrong, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(sorted(filter(None, known)))})" if known else ""
