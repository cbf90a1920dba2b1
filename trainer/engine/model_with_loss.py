"""The module that the engine trains: a model with its objective, which maps a batch to a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from hydrazero.models.atomistic import AtomisticModel, Predictions
from hydrazero.models.ops.compiled import CompilationError, CompiledModel, use_kernels
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.engine.compiled_loss import CompiledLoss, FoundLoss, new_probe
from hydrazero.trainer.engine.losses import Objective
from hydrazero.trainer.ranks.distributed import gather_objects

STEPS, MEASURING_STEPS, PREDICTIONS = "steps", "steps that measure the tasks' gradients", "predictions"
"""The three computations that are compiled, each into graphs of its own."""
Result = TypeVar("Result")

PREFIX = "model."
"""Beginning of the names of the model's weights in the engine and in its checkpoints."""


class ModelWithLoss(nn.Module):
    """Model and objective as one module, whose forward returns the loss of a batch; eager, or as a compiled graph."""

    def __init__(self, model: AtomisticModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.measuring = False
        """Whether the gradients of the tasks' losses are measured too; compiled steps have a graph for each case."""
        self.not_compiled: dict[str, str] = {}
        """Computations that run eagerly since they could not be compiled, with the reason; the same on every rank."""
        self._agreed: set[str] = set()
        """Computations that every rank has compiled."""
        self._measured: list[Callable[[], Tensor]] = []
        self._compiled: CompiledLoss | None = None
        self._compiled_model: CompiledModel | None = None

    @property
    def compiles_steps(self) -> bool:
        """Whether compiled graphs are used, except for what is `not_compiled`."""
        return self._compiled is not None

    def compile_steps(self) -> str | None:
        """Use compiled graphs for losses with their gradients, and for predictions, from now on.

        Return None, or the reason why the kernels for the CPU are missing, without which steps are slower.
        """
        reason = use_kernels(self.model)
        self._compiled, self._compiled_model = CompiledLoss(self.model), CompiledModel(self.model)
        return reason

    def forward(self, batch: GraphBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch (a scalar with gradients), and its sums [tasks, columns], without gradients.

        `counts` [tasks, quantities] are the numbers of labels in the batches of all ranks.
        """
        if self._compiled is not None and (found := self.loss_with_gradients(batch, counts)) is not None:
            return self._compiled.differentiable(found), found.sums
        probe = new_probe(self.model) if self.measuring else None
        sums = self.objective.sums(self.model(batch, probe), batch)
        loss = self.objective.total(sums, counts)
        if probe is not None:
            self._measured.append(_gradient_once_there(loss, probe))
        return loss, sums.detach()

    def loss_with_gradients(self, batch: GraphBatch, counts: Tensor) -> FoundLoss | None:
        """Return the loss of a batch with its gradients from a compiled graph; None if steps are not compiled.

        The arguments are those of `forward`. Called on every rank.
        """
        if (compiled := self._compiled) is None:
            return None
        kind = MEASURING_STEPS if self.measuring else STEPS
        found = self._by_graph(kind, lambda: compiled(batch, counts, self.objective, self.measuring))
        if found is not None and (measured := found.measured) is not None:
            self._measured.append(lambda: measured)
        return found

    def _by_graph(self, kind: str, run: Callable[[], Result]) -> Result | None:
        """Return the result of a compiled graph; None if some rank cannot compile it. Called on every rank.

        All ranks use graphs or none does: a graph returns gradients in another order than autograd, and ZeRO 2 adds
        them up in the order in which they arrive.
        """
        if kind in self.not_compiled:
            return None
        if kind in self._agreed:
            return run()
        found, reason = None, ""
        try:
            found = run()
        except CompilationError as error:
            reason = str(error)
        reasons = [f"rank {number}: {why}" for number, why in enumerate(gather_objects(reason)) if why]
        if reasons:
            self.not_compiled[kind] = "; ".join(reasons)
            return None
        self._agreed.add(kind)
        return found

    def take_task_gradients(self) -> Tensor | None:
        """Return the gradients of the tasks' weighted losses since the last call, of this rank's structures.

        They are taken with respect to a linear layer between encoder and heads: [tasks, F * F] float64 for F features;
        None if none were measured. To be called after the backward pass.
        """
        found = [gradient().detach().to(torch.float64).flatten(1) for gradient in self._measured]
        self._measured.clear()
        return torch.stack(found).sum(0) if found else None

    def forget_task_gradients(self) -> None:
        """Discard the gradients of the tasks."""
        self._measured.clear()

    def predict(self, batch: GraphBatch) -> Predictions:
        """Return the predictions of the model, which must be in evaluation mode."""
        if (compiled := self._compiled_model) is not None:
            found = self._by_graph(PREDICTIONS, lambda: compiled(batch))
            if found is not None:
                return found
        predictions: Predictions = self.model(batch)
        return predictions


def _gradient_once_there(loss: Tensor, probe: Tensor) -> Callable[[], Tensor]:
    """Return a function for the probe's gradient after the backward pass, without the factors of the engine."""
    factors: list[Tensor] = []
    loss.register_hook(factors.append)

    def gradient() -> Tensor:
        if probe.grad is None:
            return torch.zeros_like(probe)
        return probe.grad / factors[0]

    return gradient
