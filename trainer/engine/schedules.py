"""A schedule of the learning rate, applied to an optimizer; its shapes are defined in `config/schedule_shapes.py`."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from hydrazero.trainer.config.schedule_shapes import Plateau, StableDecay


class Schedule:
    """A shape applied to an optimizer; DeepSpeed calls `step` after each step of the optimizer, and saves the state."""

    def __init__(self, optimizer: Optimizer, shape: StableDecay | Plateau) -> None:
        self.optimizer, self.shape = optimizer, shape
        self.full = [float(group["lr"]) for group in optimizer.param_groups]
        self.taken = 0
        self.reductions = 0
        self.best: float | None = None
        self.stale = 0
        self._set()

    def _set(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def step(self) -> None:
        """Set the learning rate of the next step."""
        self.taken += 1
        self._set()

    def report(self, loss: float) -> None:
        """Add a validation loss, on which a plateau depends."""
        if not isinstance(self.shape, Plateau):
            return
        if self.best is None or loss < self.best:
            self.best, self.stale = loss, 0
            return
        self.stale += 1
        if self.stale >= self.shape.patience:
            self.reductions, self.stale = self.reductions + 1, 0
            self._set()

    def count_anew(self, *, best: bool) -> None:
        """Start anew to count evaluations without a lower validation loss; with `best`, forget the lowest one too."""
        self.best, self.stale = None if best else self.best, 0

    def get_lr(self) -> list[float]:
        """Return the learning rates of the next step, one for each group of parameters."""
        ratio = self.shape.ratio(self.taken + 1, self.reductions)
        return [full * ratio for full in self.full]

    def get_last_lr(self) -> list[float]:
        """Return the same as `get_lr`; DeepSpeed calls this name too."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule for a checkpoint."""
        return {name: getattr(self, name) for name in ("taken", "reductions", "best", "stale")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint."""
        vars(self).update(state)
        self._set()
