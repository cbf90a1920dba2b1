"""Steps that fail are skipped and counted; too many of them in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hydrazero.shards.errors import HydrazeroError

SHOWN = 20
"""Number of structures that a message names."""
KEEP = 0.98
"""Fraction of the running mean and variance of log losses that each step keeps."""
SETTLED = 100
"""Number of steps after which the running mean and variance are used."""


class NonFiniteLossError(HydrazeroError):
    """The loss or the gradient of too many steps in a row was NaN or infinite."""


class StepGuard:
    """Counts skipped steps and recognises loss spikes; its state is the same on every rank."""

    def __init__(self, max_skipped: int, spike: float) -> None:
        self.max_skipped, self.spike = max_skipped, spike
        self.skipped = 0
        """Number of steps skipped so far."""
        self.rescaled = 0
        """Number of steps skipped so far while fp16 adapted the scale of its loss, which is no fault."""
        self.in_a_row = 0
        self.mean = self.variance = 0.0
        self.steps = 0

    def is_spike(self, loss: float) -> bool:
        """Return whether the logarithm of a loss is more than `spike` standard deviations above its running mean."""
        if not self.spike or self.steps < SETTLED or not math.isfinite(loss) or loss <= 0:
            return False
        return math.log(loss) - self.mean > self.spike * math.sqrt(self.variance)

    def done(self, loss: float) -> None:
        """Add the loss of a step that was not skipped."""
        self.in_a_row = 0
        if not self.spike or loss <= 0:
            return
        self.steps += 1
        keep = min(KEEP, 1.0 - 1.0 / self.steps)
        change = math.log(loss) - self.mean
        self.mean += (1.0 - keep) * change
        self.variance = keep * (self.variance + (1.0 - keep) * change * change)

    def shift(self, change: float) -> None:
        """Add a change of the logarithms of all losses from now on, caused by new weights of the tasks."""
        self.mean += change

    def rescale(self, step: int) -> str | None:
        """Count a step that was skipped because of the scale of the loss; return a sentence on the first one."""
        self.rescaled += 1
        if self.rescaled > 1:
            return None
        return (
            f"fp16: the gradient of step {step} is too large for the scale of the loss, which is lowered; such steps "
            "are skipped and counted as rescaled_steps."
        )

    def skip(self, step: int, loss: float, names: Sequence[str]) -> str:
        """Count a step that was skipped, and return a sentence on it.

        Raises NonFiniteLossError if `max_skipped` steps in a row have been skipped.
        """
        self.skipped += 1
        self.in_a_row += 1
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        if not math.isfinite(loss):
            reason = f"the loss of step {step} is not finite"
        elif self.is_spike(loss):
            reason = f"the loss of step {step}, {loss:.4g}, is far above that of the steps before"
        else:
            reason = f"the gradient of step {step} is not finite although its loss is"
        where = f"; it came from a batch with the structures {shown}" if names else ""
        if self.in_a_row >= self.max_skipped:
            raise NonFiniteLossError(
                f"{reason}{where}; {self.in_a_row} steps in a row have been skipped: check the labels of these "
                "structures, look for atoms that nearly coincide, or lower the learning rate and resume from the last "
                "checkpoint."
            )
        return f"warning: {reason}{where}; the step is skipped and changes no weight ({self.skipped} so far)."

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        names = ("skipped", "rescaled", "in_a_row", "mean", "variance", "steps")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        vars(self).update(state)

    def forget_losses(self) -> None:
        """Start anew with the statistics of losses, since losses from now on cannot be compared with those before."""
        self.mean = self.variance = 0.0
        self.steps = 0
