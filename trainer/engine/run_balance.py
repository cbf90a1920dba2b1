"""The balancing of a run's tasks: the method gets the observations of each step, and weights the next step's loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hydrazero.trainer.balance import BalanceFacts, BalanceSection, Observation, make_balancer
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.ranks.distributed import sum_over_ranks


class RunBalance:
    """The weights of a run's tasks; the same on every rank."""

    def __init__(self, settings: BalanceSection, facts: BalanceFacts, trained: ModelWithLoss) -> None:
        self.trained = trained
        self.names = [task.name for task in trained.model.tasks]
        self.own_weights = trained.objective.task_weights.clone()
        self.method = settings.method
        self.balancer = make_balancer(settings, facts)
        # With one task there is nothing to balance.
        self.every = settings.every if len(self.names) > 1 else 0
        self.shift = 0.0
        """Change of the logarithm of the loss that the last change of the weights alone has caused."""
        self._use()

    def _use(self) -> None:
        weights = self.own_weights * self.balancer.weights.to(self.own_weights.device)
        self.trained.objective.task_weights.copy_(weights)

    def due(self, step: int) -> bool:
        """Return whether the gradients of the tasks are measured in a step."""
        return self.every > 0 and step % self.every == 0

    def prepare(self, step: int) -> None:
        """Turn the measurement of gradients on or off for a step; called before the step."""
        self.trained.forget_task_gradients()
        self.trained.measuring = self.due(step)

    def update(self, step: int, losses: Tensor) -> dict[str, Any] | None:
        """Pass a step's losses [tasks], NaN for tasks without labels, to the method; called on every rank after a step.

        Return a row of measurements for the log, None if gradients were not measured in the step.
        """
        gram = None
        if self.due(step):
            gram = self._gram(~losses.isnan())
        before = self.balancer.weights
        self.balancer.update(step, Observation(losses=losses, gram=gram))
        self._use()
        changed = self.balancer.weights is not before  # methods replace weights, and never change them in place
        self.shift = self._log_change(before, losses) if changed else 0.0
        return None if gram is None else self._row(step, gram)

    def _log_change(self, before: Tensor, losses: Tensor) -> float:
        """Return the change of the logarithm of the weighted mean of losses [tasks]; 0 if it is not defined."""
        own, known = self.own_weights.cpu(), losses.cpu().nan_to_num()
        old, new = (float((own * w * known).sum() / (own * w).sum()) for w in (before, self.balancer.weights))
        return math.log(new / old) if 0 < old < math.inf and 0 < new < math.inf else 0.0

    def _gram(self, present: Tensor) -> Tensor:
        """Return the scalar products of the gradients of the tasks' unweighted losses, [tasks, tasks] float64.

        Gradients are summed over ranks first: the norms of the ranks' own parts are larger, by noise.
        """
        gradients = self.trained.take_task_gradients()
        if gradients is None:
            raise RuntimeError("the gradients of the tasks were not measured in this step.")
        weights = self.trained.objective.task_weights
        vectors = sum_over_ranks(gradients) / (weights / weights.sum()).clamp(min=1e-300).unsqueeze(1)
        known = present & (weights.cpu() > 0)
        gram = (vectors @ vectors.t()).cpu()
        return torch.where(known.unsqueeze(0) & known.unsqueeze(1), gram, float("nan"))

    def _row(self, step: int, gram: Tensor) -> dict[str, Any]:
        norms = gram.diagonal().sqrt()
        cosines = gram / (norms.unsqueeze(0) * norms.unsqueeze(1)).clamp(min=1e-300)
        return {
            "step": step,
            "gradient_norms": dict(zip(self.names, _plain(norms), strict=True)),
            "cosines": [_plain(row) for row in cosines],
            "weights": self.weights(),
        }

    def weights(self) -> dict[str, float]:
        """Return the weight of each task's loss: the product of its own and the method's."""
        return dict(zip(self.names, self.trained.objective.task_weights.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        return {"method": self.method, **self.balancer.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state, unless it is that of another method."""
        if state["method"] == self.method:
            self.balancer.load({name: value for name, value in state.items() if name != "method"})
            self._use()


def _plain(values: Tensor) -> list[float | None]:
    """Return numbers for JSON, with None in the place of NaN."""
    return [None if value != value else value for value in values.tolist()]
