"""What the engine trains: a model with its objective, from a batch to a loss; eager, or as one compiled graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.compiled import BatchTensors, CompiledModel, compile_traced, layout_key, use_kernels
from hydrazero.shards.graph import GraphBatch
from hydrazero.trainer.losses import Objective

PREFIX = "model."
"""Of the model's weights in the engine's checkpoints."""


class TrainedModel(nn.Module):
    """Model and objective; calling it gives the loss of a batch."""

    def __init__(self, model: AtomisticModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self._compiled: CompiledLoss | None = None
        self._compiled_model: CompiledModel | None = None

    def compile_steps(self) -> str | None:
        """Compute losses with their gradients, and predictions, by compiled graphs from now on.

        Returns why the kernels for the CPU cannot be had, in which case the compiler makes do without them.
        """
        reason = use_kernels(self.model)
        self._compiled, self._compiled_model = CompiledLoss(self.model), CompiledModel(self.model)
        return reason

    def forward(self, batch: GraphBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, with gradients, given all ranks' counts of labels, and its sums.

        The counts are [tasks, quantities]; the sums, [tasks, columns], carry no gradient.
        """
        if self._compiled is not None:
            return self._compiled(batch, counts, self.objective)
        sums = self.objective.sums(self.model(batch), batch)
        return self.objective.total(sums, counts), sums.detach()

    def evaluate(self, batch: GraphBatch) -> Tensor:
        """Return the sums of a batch by the model in evaluation mode."""
        predict = self.model if self._compiled_model is None else self._compiled_model
        return self.objective.sums(predict(batch), batch).detach()


class CompiledLoss:
    """Loss, sums and the gradients of all parameters in one graph, one for each shape of batch."""

    def __init__(self, model: AtomisticModel) -> None:
        self.model = model
        self._graphs: dict[tuple[Any, ...], tuple[BatchTensors, Any, list[bool]]] = {}

    def __call__(self, batch: GraphBatch, counts: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """Return the loss, whose gradients are at hand, and the sums."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        key = layout_key(batch)
        if key not in self._graphs:
            self._graphs[key] = self._trace(batch, counts, objective, parameters)
        layout, graph, used = self._graphs[key]
        rest = [counts, objective.task_weights, *self._fixed().values(), *layout.flat(batch)]
        loss, sums = _GradientsAtHand.apply(graph, used, rest, *parameters)
        return loss, sums

    def _fixed(self) -> dict[str, Tensor]:
        """Weights that are not trained, and buffers."""
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(self.model.named_buffers())}

    def _trace(
        self, batch: GraphBatch, counts: Tensor, objective: Objective, parameters: Sequence[Tensor]
    ) -> tuple[BatchTensors, Any, list[bool]]:
        layout, used = BatchTensors(batch), [True] * len(parameters)
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        fixed = list(self._fixed())

        def step(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            weights = [tensor.detach().requires_grad_() for tensor in tensors[: len(trained)]]
            given, task_weights = tensors[len(trained) : len(trained) + 2]
            others = tensors[len(trained) + 2 : len(trained) + 2 + len(fixed)]
            now = layout.batch(tensors[len(trained) + 2 + len(fixed) :])
            state = dict(zip([*trained, *fixed], [*weights, *others], strict=True))
            weighted = replace(objective, task_weights=task_weights)
            sums = weighted.sums(functional_call(self.model, state, (now,)), now)
            loss = weighted.total(sums, given)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            used[:] = [gradient is not None for gradient in gradients]
            return loss.detach(), sums.detach(), *(gradient for gradient in gradients if gradient is not None)

        inputs = [*parameters, counts, objective.task_weights, *self._fixed().values(), *layout.flat(batch)]
        return layout, compile_traced(step, inputs), used


class _GradientsAtHand(Function):
    """Runs a graph that gives loss, sums and gradients; backward hands the gradients over, so hooks fire as ever."""

    @staticmethod
    def forward(
        ctx: Any, graph: Any, used: list[bool], rest: list[Tensor], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, sums, *gradients = graph([*parameters, *rest])
        ctx.used, ctx.gradients = used, gradients
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = iter(ctx.gradients)
        factor = grads[0]
        handed = [next(found) if used else None for used in ctx.used]
        ctx.gradients = []
        return None, None, None, *(None if g is None else g * factor.to(g.dtype) for g in handed)
