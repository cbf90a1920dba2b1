"""The number of steps that fit into given hours, from measured steps, and what depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.rehearsal.measure_steps import StepTimes

EVALUATIONS = 20
"""Number of evaluations in a run, if they do not take too long."""
MIN_INTERVAL = 50
"""Minimum number of steps between evaluations, of which short runs need only a few."""
EVALUATION_SHARE = 0.2
"""Maximum fraction of the time for evaluations."""
MOST_EPOCHS = 1000
"""Maximum number of times that each structure is used, however many hours there are."""
REPEATED = 50
"""Epochs from which on a run may overfit, so that it stops when the validation loss no longer improves."""
PATIENCE = 6
"""Number of evaluations without improvement after which such a run stops."""
FEW = 10
"""With fewer validation structures, their loss is too uncertain to stop a run or to choose a checkpoint by."""
LONG = 2000
"""Steps from which on the weights are averaged over about 1,000 steps instead of 100."""
COMPILE_FROM = 600.0
"""Seconds of training from which on compiled steps are tried: compiling takes a minute or more."""


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """The values of [train], and what their comments say."""

    steps: int
    """Number of steps of the run."""
    every: int
    """Number of steps between evaluations, and between checkpoints."""
    log_every: int
    """Number of steps between rows of the log."""
    keep_best: bool
    """Whether the checkpoint with the lowest validation loss is kept."""
    patience: int
    """Number of evaluations without improvement after which the run stops early; 0: it does not stop early."""
    average: float
    """Decay per step of the moving average of the weights."""
    compile: bool
    """Whether steps are compiled."""
    why_steps: str
    """Comment on `steps`."""
    why_best: str
    """Comment on `keep_best`."""
    why_patience: str
    """Comment on `patience`."""
    why_compile: str
    """Comment on `compile`."""


def run_length(*, hours: float, ranks: int, train: int, val: int, times: StepTimes | None) -> RunLength:
    """Return the values of [train] for a run of `hours` on `ranks` ranks.

    `train` and `val` are the numbers of training and validation structures. Without measured times, return
    those of a run whose steps are to be measured. Raises ConfigError if there is not enough time for one step.
    """
    if times is None:
        steps, why_steps = 1_000_000, ""
        compiled, why_compile = 3600 * hours >= COMPILE_FROM, ""
    else:
        steps, compiled, why_compile = _steps(hours, ranks, val, times)
        steps, why_steps = _limited(steps, hours, ranks, train, times, compiled)
    epochs = steps * ranks * times.structures / train if times is not None else 0.0
    patience, why_patience = _patience(epochs, val)
    best = (
        "The checkpoint with the lowest validation loss is kept, evaluated and exported."
        if val >= FEW
        else f"There are {val or 'no'} validation structures, too few to choose a checkpoint by: the last one is used."
    )
    return RunLength(
        steps=steps,
        every=max(-(-steps // _evaluations(hours, ranks, val, times)), min(MIN_INTERVAL, steps)),
        log_every=min(max(steps // 200, 1), 50),
        keep_best=val >= FEW,
        patience=patience,
        average=0.999 if steps >= LONG else 0.99,
        compile=compiled,
        why_steps=why_steps,
        why_best=best,
        why_patience=why_patience,
        why_compile=why_compile,
    )


def _evaluation_seconds(ranks: int, val: int, times: StepTimes) -> float:
    """Return the seconds of one evaluation of all validation structures."""
    return -(-val // max(round(times.structures * ranks), 1)) * times.validation


def _evaluations(hours: float, ranks: int, val: int, times: StepTimes | None) -> int:
    seconds = _evaluation_seconds(ranks, val, times) if times is not None else 0.0
    return EVALUATIONS if not seconds else min(max(int(EVALUATION_SHARE * 3600 * hours / seconds), 1), EVALUATIONS)


def structures_in(*, hours: float, ranks: int, val: int, times: StepTimes) -> float:
    """Return the number of structures that `ranks` ranks with these times train on within `hours`."""
    return max(_fitting(hours, ranks, val, times)) * ranks * times.structures


def _fitting(hours: float, ranks: int, val: int, times: StepTimes) -> tuple[int, int]:
    """Return the numbers of eager and of compiled steps that fit into the hours; the latter is 0 if there are none."""
    left = 3600 * hours - _evaluations(hours, ranks, val, times) * _evaluation_seconds(ranks, val, times)
    compiled = 0 if times.compiled is None else max(int((left - times.compiling) / times.compiled), 0)
    return int(left / times.eager), compiled


def _steps(hours: float, ranks: int, val: int, times: StepTimes) -> tuple[int, bool, str]:
    """Return the steps that fit into the hours, whether to compile them, and a sentence on that."""
    eager, after = _fitting(hours, ranks, val, times)
    if times.compiled is None:
        if 3600 * hours < COMPILE_FROM:
            why = "Compiled steps are faster, but compiling takes a minute or more, too long for so short a run."
        else:
            why = "Steps cannot be compiled on this machine."
        steps, compiled = eager, False
    else:
        compiled, steps = after > eager, max(after, eager)
        why = (
            f"Compiling takes {times.compiling:.0f} s at the start; a step then takes {times.compiled:.3g} s "
            f"instead of {times.eager:.3g} s."
        )
        why += "" if compiled else " In this run, compiling takes longer than it saves."
    if steps < 1:
        raise ConfigError(
            f"--hours is {hours:g}, which is too short: one training step takes {times.eager:.3g} s here; ask for more."
        )
    return steps, compiled, why


def _limited(steps: int, hours: float, ranks: int, train: int, times: StepTimes, compiled: bool) -> tuple[int, str]:
    """Return the steps as a round number, at most MOST_EPOCHS epochs, and a sentence on how they were chosen."""
    per_step = ranks * times.structures
    seconds = times.compiled if compiled and times.compiled is not None else times.eager
    most = max(int(MOST_EPOCHS * train / per_step), 1)
    chosen = _rounded(min(steps, most))
    epochs = chosen * per_step / train
    shown = f"{epochs:,.0f} times" if epochs >= 10 else f"{epochs:.2g} times"
    why = (
        f"Number of optimizer steps. With {ranks} rank{'s' if ranks > 1 else ''} a step takes {seconds:.3g} s on this "
        f"machine and uses about {per_step:.0f} structures, so that each training structure is used about {shown}."
    )
    if chosen < _rounded(steps):
        limit = f"the run is limited to {MOST_EPOCHS:,} uses of each structure"
        return chosen, f"{why} {_time(hours)} would allow {_rounded(steps):,} steps; {limit}."
    return chosen, f"{why} The run takes about {_time(hours)}, including evaluations."


def _time(hours: float) -> str:
    return f"{hours:g} hour{'' if hours == 1 else 's'}" if hours >= 1 else f"{60 * hours:.3g} minutes"


def _rounded(steps: int) -> int:
    """Round down to two significant digits."""
    unit = 10 ** max(len(str(steps)) - 2, 0)
    return steps // unit * unit


def _patience(epochs: float, val: int) -> tuple[int, str]:
    if val < FEW:
        return 0, "The run does not stop early, because there are too few validation structures to judge by."
    if epochs <= REPEATED:
        return 0, "Number of evaluations without improvement after which the run stops early; 0: it never does."
    return (
        PATIENCE,
        "The run stops early after this number of evaluations without a lower validation loss (overfitting).",
    )
