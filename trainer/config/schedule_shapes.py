"""Learning-rate schedules that DeepSpeed does not have, with their names in a DeepSpeed JSON.

"scheduler": {"type": "WarmupStableDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 100}}
"scheduler": {"type": "WarmupPlateauLR", "params": {"warmup_num_steps": 100, "factor": 0.5, "patience": 3}}
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hydrazero.shards.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """A linear rise of the learning rate in the first steps, with which both schedules begin."""

    warmup_num_steps: int = 100
    """Number of steps in which the learning rate rises to its full value."""
    warmup_min_ratio: float = 0.01
    """Learning rate before the first step, as a fraction of the full one."""

    def ratio(self, step: int, reductions: int) -> float:
        """Return the learning rate of a step, counted from 1, as a fraction of the full one.

        `reductions` is the number of times that a plateau of the validation loss has lowered it.
        """
        if step <= self.warmup_num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * step / self.warmup_num_steps
        return self._ratio_after(step, reductions)

    def _ratio_after(self, step: int, reductions: int) -> float:
        """Return the ratio of a step after the warm-up."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class StableDecay(WarmUp):
    """A warm-up, a stable phase, and a linear decay (Hu et al. 2024, MiniCPM, arXiv 2404.06395, sec. 4.2)."""

    total_num_steps: int
    """Number of steps of the run; "auto" in the JSON stands for it."""
    decay_share: float = 0.2
    """Fraction of the steps in which the learning rate decays, at the end of the run."""
    min_ratio: float = 0.001
    """Learning rate of the last step, as a fraction of the full one."""

    def _ratio_after(self, step: int, reductions: int) -> float:
        decay = max(round(self.decay_share * self.total_num_steps), 1)
        left = min(max(self.total_num_steps - step, 0) / decay, 1.0)
        return self.min_ratio + (1 - self.min_ratio) * left


@dataclass(frozen=True, kw_only=True)
class Plateau(WarmUp):
    """A warm-up, then a learning rate that is lowered whenever the validation loss has stopped falling."""

    factor: float = 0.5
    """Factor by which the learning rate is lowered each time."""
    patience: int = 3
    """Number of evaluations without a new lowest validation loss before the learning rate is lowered."""
    min_ratio: float = 0.001
    """Lowest learning rate, as a fraction of the full one."""

    def _ratio_after(self, step: int, reductions: int) -> float:
        return max(self.factor**reductions, self.min_ratio)


SHAPES: dict[str, type[StableDecay] | type[Plateau]] = {
    "WarmupStableDecayLR": StableDecay,
    "WarmupPlateauLR": Plateau,
}

SHARES = ("warmup_min_ratio", "decay_share", "min_ratio", "factor")
"""Parameters that are fractions, and so at most 1."""


def own_shape(document: dict[str, Any]) -> StableDecay | Plateau | None:
    """Return the schedule of a DeepSpeed JSON if it is one of these; raise ConfigError for wrong parameters."""
    scheduler = document.get("scheduler", {})
    kind = SHAPES.get(scheduler.get("type", ""))
    if kind is None:
        return None
    params = scheduler.get("params", {})
    known = {item.name for item in fields(kind)}
    for key, value in params.items():
        if key not in known:
            raise ConfigError(f"scheduler.params.{key} is not known{did_you_mean(key, sorted(known))}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ConfigError(f"scheduler.params.{key} is {value!r}; it must be a number of at least 0.")
        if value > 1 and key in SHARES:
            raise ConfigError(f"scheduler.params.{key} is {value!r}; it must be a fraction, from 0 to 1.")
    if kind is StableDecay and "total_num_steps" not in params:
        raise ConfigError('scheduler.params.total_num_steps is missing; "auto" stands for the steps of the run.')
    return kind(**params)
