"""Loss, sums and gradients of a batch as one compiled graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import functional_call

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.ops.compiled import BatchTensors, compile_traced, layout_key
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.engine.losses import Objective


def new_probe(model: AtomisticModel) -> Tensor:
    """Return zeros [tasks, F, F], added to a linear layer between encoder and heads for the sake of their gradient."""
    features = model.settings.encoder.features
    device = model.energy_head.first.weight.device
    return torch.zeros(len(model.tasks), features, features, dtype=model.dtype, device=device, requires_grad=True)


@dataclass(frozen=True, kw_only=True)
class FoundLoss:
    """What a compiled graph finds for a batch, all of it without gradients."""

    loss: Tensor
    """The loss, a scalar."""
    sums: Tensor
    """The objective's sums, [tasks, columns] float64."""
    measured: Tensor | None
    """Gradients of the tasks with respect to the probe; None if they were not measured."""
    gradients: list[Tensor]
    """Gradient of each trained parameter, in the model's order; zero where the loss does not depend on it."""


class CompiledLoss:
    """One compiled graph for the loss, its sums and the gradients of all parameters, for each shape of batch.

    Steps that measure the gradients of the tasks have a graph of their own, compiled for the first of them: in every
    step the measurement would cost 6% of the time.
    """

    def __init__(self, model: AtomisticModel) -> None:
        self.model = model
        self._graphs: dict[tuple[Any, ...], Any] = {}

    def __call__(self, batch: GraphBatch, counts: Tensor, objective: Objective, measuring: bool) -> FoundLoss:
        """Return loss, sums and gradients of a batch, and the gradients of the tasks if `measuring` is true.

        Raises CompilationError if the graph cannot be compiled.
        """
        probes = [new_probe(self.model)] if measuring else []
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        key = (measuring, layout_key(batch))
        layout = BatchTensors(batch)
        given = [counts, objective.task_weights, objective.weights]
        rest = [*given, *self._fixed().values(), *layout.flat(batch), *probes]
        if key not in self._graphs:
            self._graphs[key] = self._trace(layout, objective, parameters, rest)
        loss, sums, *gradients = self._graphs[key]([*parameters, *rest])
        measured = gradients.pop(0) if measuring else None
        return FoundLoss(loss=loss, sums=sums, measured=measured, gradients=gradients)

    def differentiable(self, found: FoundLoss) -> Tensor:
        """Return the loss that was found, whose backward pass hands the gradients over to hooks as usual."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        loss: Tensor = _KnownGradients.apply(found, *parameters)
        return loss

    def _fixed(self) -> dict[str, Tensor]:
        """Return weights that are not trained, and buffers."""
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(self.model.named_buffers())}

    def _trace(
        self, layout: BatchTensors, objective: Objective, parameters: Sequence[Tensor], rest: Sequence[Tensor]
    ) -> Any:
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        fixed, wide = list(self._fixed()), self.model.dtype

        def step(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            # Gradients of weights in lower precision are returned in the model's own: autograd rounds them once.
            weights = [tensor.detach().to(wide).requires_grad_() for tensor in tensors[: len(trained)]]
            counts, task_weights, quantity_weights, *held = tensors[len(trained) :]
            others, held = held[: len(fixed)], held[len(fixed) :]
            now = layout.batch(held[: len(layout.names)])
            probes = [probe.detach().requires_grad_() for probe in held[len(layout.names) :]]
            state = dict(zip([*trained, *fixed], [*weights, *others], strict=True))
            weighted = replace(objective, task_weights=task_weights, weights=quantity_weights)
            sums = weighted.sums(functional_call(self.model, state, (now, *probes)), now)
            loss = weighted.total(sums, counts)
            # DeepSpeed's hooks expect a gradient of every parameter.
            gradients = torch.autograd.grad(loss, [*weights, *probes], materialize_grads=True)
            return loss.detach(), sums.detach(), *gradients[len(weights) :], *gradients[: len(weights)]

        return compile_traced(step, [*parameters, *rest])


class _KnownGradients(Function):
    """A loss whose gradients are known: backward returns them."""

    @staticmethod
    def forward(ctx: Any, found: FoundLoss, *parameters: Tensor) -> Tensor:
        ctx.gradients = found.gradients
        return found.loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        handed = torch._foreach_mul(ctx.gradients, grads[0].to(ctx.gradients[0].dtype))
        ctx.gradients = []
        return None, *handed
