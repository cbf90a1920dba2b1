"""Errors that are meant for users: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


class HydrazeroError(ValueError):
    """Base of every error that the command line prints as one sentence instead of a traceback."""

    on_every_rank = True
    """Whether all ranks of a run raise it together; False for what one rank alone has met, in its data."""
    exit_status = 1
    """Of a rank that ends with it; 1 stands for what would happen again."""


class StructureError(HydrazeroError):
    """A structure that cannot be used; `reason` is a short stable word that bad frames are counted by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[StructureError], tuple[str, str]]:
        """Let the error travel between processes with both of its arguments."""
        return type(self), (self.reason, str(self))


class SourceError(HydrazeroError):
    """A source file that cannot be read, or settings that do not fit it."""


class ShardError(HydrazeroError):
    """A shard or manifest that is missing, damaged, of a newer format, or contradicts another."""


class ConfigError(HydrazeroError):
    """A run file, DeepSpeed JSON or command-line value that cannot be used."""


class CheckpointError(HydrazeroError):
    """A run that ends without the checkpoint that it should have left."""


class ModelFileError(HydrazeroError):
    """An exported model that cannot be read, or is asked for something that it does not hold."""


def did_you_mean(wrong: str, known: list[str]) -> str:
    """Return ' (did you mean X?)' for the closest known name, or the list of known names."""
    from difflib import get_close_matches

    close = get_close_matches(wrong, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(sorted(known))})" if known else ""
