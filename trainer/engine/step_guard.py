"""What is done about steps that go wrong: skipped and counted, until there are too many in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hydrazero.shards.errors import HydrazeroError

SHOWN = 20
KEEP = 0.98
"""Of the running mean and variance of log losses, at each step."""
SETTLED = 100
"""Steps before the running mean and variance are trusted."""


class NonFiniteLossError(HydrazeroError):
    """The loss or the gradient of too many steps in a row was NaN or infinite."""


class StepGuard:
    """Watches losses, the same on every rank."""

    def __init__(self, max_skipped: int, spike: float) -> None:
        self.max_skipped, self.spike = max_skipped, spike
        self.skipped = 0
        """Steps that were skipped so far."""
        self.rescaled = 0
        """Steps that were left out so far while fp16 looked for the scale of its loss, which is as it should be."""
        self.in_a_row = 0
        self.mean = self.variance = 0.0
        self.steps = 0

    def is_spike(self, loss: float) -> bool:
        """Whether a loss lies more than `spike` standard deviations above what it was of late, in logarithms."""
        if not self.spike or self.steps < SETTLED or not math.isfinite(loss) or loss <= 0:
            return False
        return math.log(loss) - self.mean > self.spike * math.sqrt(self.variance)

    def done(self, loss: float) -> None:
        """Take in the loss of a step that was taken."""
        self.in_a_row = 0
        if not self.spike or loss <= 0:
            return
        self.steps += 1
        keep = min(KEEP, 1.0 - 1.0 / self.steps)
        change = math.log(loss) - self.mean
        self.mean += (1.0 - keep) * change
        self.variance = keep * (self.variance + (1.0 - keep) * change * change)

    def shift(self, change: float) -> None:
        """Take in how much larger the logarithms of losses are from now on, since tasks have other weights."""
        self.mean += change

    def rescale(self, step: int) -> str | None:
        """Count a step that was left out for the scale of the loss; returns a sentence on the first."""
        self.rescaled += 1
        if self.rescaled > 1:
            return None
        return (
            f"fp16: the gradient of step {step} is too large for the scale of the loss, which is lowered; such steps "
            "are left out and counted as rescaled_steps."
        )

    def skip(self, step: int, loss: float, names: Sequence[str]) -> str:
        """Count a step that was skipped, return a sentence on it.

        Raises NonFiniteLossError if it is one too many in a row.
        """
        self.skipped += 1
        self.in_a_row += 1
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        if not math.isfinite(loss):
            reason = f"the loss of step {step} is not finite"
        elif self.is_spike(loss):
            reason = f"the loss of step {step}, {loss:.4g}, is far above those before it"
        else:
            reason = f"the gradient of step {step} is not finite although its loss is"
        where = f"; it came from a batch with the structures {shown}" if names else ""
        if self.in_a_row >= self.max_skipped:
            raise NonFiniteLossError(
                f"{reason}{where}; {self.in_a_row} steps in a row are skipped: check the labels of these structures, "
                "look for atoms that nearly coincide, or lower the learning rate and go on from the last checkpoint."
            )
        return f"warning: {reason}{where}; the step is skipped and no weight changes ({self.skipped} so far)."

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        kept = ("skipped", "rescaled", "in_a_row", "mean", "variance", "steps")
        return {name: getattr(self, name) for name in kept}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        vars(self).update(state)
