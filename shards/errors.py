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


MOST_NAMES = 20
"""Largest number of known names in a message."""


def did_you_mean(wrong: str, known: list[str]) -> str:
    """Return ' (did you mean X?)' with the closest known name, or a list of the known names if none is close.

    A name that has other numbers, but is alike otherwise, is not suggested: 'float32' is no spelling of 'float16'.
    """
    from difflib import get_close_matches

    close = get_close_matches(wrong, [name for name in known if not _differs_by_numbers(wrong, name)], n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    names = sorted(filter(None, known))
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return f" (known: {', '.join(names[:MOST_NAMES])}{more})" if names else ""


def _differs_by_numbers(one: str, other: str) -> bool:
    """Return whether two names have the same letters, but other digits; digits in another order are a misspelling."""
    letters, digits = zip(*(_parts(name) for name in (one, other)), strict=True)
    return letters[0] == letters[1] and digits[0] != digits[1] and bool(digits[0])


def _parts(name: str) -> tuple[str, list[str]]:
    return "".join(c for c in name if not c.isdigit()), sorted(filter(str.isdigit, name))
