"""What the engine trains: a model with its objective, from a batch to a loss; eager, or as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from hydrazero.models.atomistic import AtomisticModel, Predictions
from hydrazero.models.ops.compiled import (
    BatchTensors,
    CompilationError,
    CompiledModel,
    compile_traced,
    layout_key,
    use_kernels,
)
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.engine.losses import Objective
from hydrazero.trainer.ranks.distributed import gather_objects

STEPS, MEASURING_STEPS, PREDICTIONS = "steps", "steps that measure the tasks' gradients", "predictions"
"""What is compiled, each as a graph of its own."""
Result = TypeVar("Result")

PREFIX = "model."
"""Of the model's weights in the engine's checkpoints."""


class TrainedModel(nn.Module):
    """Model and objective; calling it gives the loss of a batch."""

    def __init__(self, model: AtomisticModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.measuring = False
        """Whether gradients of the tasks' losses are measured in passing; compiled steps have a graph for either."""
        self.not_compiled: dict[str, str] = {}
        """What was to be compiled and runs eagerly, and why; the same on every rank."""
        self._agreed: set[str] = set()
        """Graphs of which every rank has its own."""
        self._measured: list[Callable[[], Tensor]] = []
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
        if (compiled := self._compiled) is not None:
            kind = MEASURING_STEPS if self.measuring else STEPS
            found = self._by_graph(kind, lambda: compiled(batch, counts, self.objective, self.measuring))
            if found is not None:
                loss, sums, gradients = found
                if gradients is not None:
                    self._measured.append(lambda: gradients)
                return loss, sums
        probe = new_probe(self.model) if self.measuring else None
        sums = self.objective.sums(self.model(batch, probe), batch)
        loss = self.objective.total(sums, counts)
        if probe is not None:
            self._measured.append(_gradient_once_there(loss, probe))
        return loss, sums.detach()

    def _by_graph(self, kind: str, run: Callable[[], Result]) -> Result | None:
        """Return what a compiled graph gives, None if it cannot be compiled on every rank; all ranks must call it.

        Ranks do the same, since a graph hands gradients over in another order than autograd, and ZeRO 2 adds them up in
        the order in which they come.
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
        """Return the gradients of the weighted losses of the tasks since the last call, by this rank's structures.

        [tasks, F * F] float64, with respect to a linear layer between encoder and heads; None if none were measured.
        Asked for after the backward pass.
        """
        found = [gradient().detach().to(torch.float64).flatten(1) for gradient in self._measured]
        self._measured.clear()
        return torch.stack(found).sum(0) if found else None

    def forget_task_gradients(self) -> None:
        """Let go of what was measured."""
        self._measured.clear()

    def predict(self, batch: GraphBatch) -> Predictions:
        """Return what the model in evaluation mode predicts."""
        if (compiled := self._compiled_model) is not None:
            found = self._by_graph(PREDICTIONS, lambda: compiled(batch))
            if found is not None:
                return found
        predictions: Predictions = self.model(batch)
        return predictions


def new_probe(model: AtomisticModel) -> Tensor:
    """Return a probe of the node scalars, to be differentiated with respect to."""
    features = model.settings.encoder.features
    device = model.energy_head.first.weight.device
    return torch.zeros(len(model.tasks), features, features, dtype=model.dtype, device=device, requires_grad=True)


def _gradient_once_there(loss: Tensor, probe: Tensor) -> Callable[[], Tensor]:
    """Return what gives the probe's gradient after the backward pass, without the factors that the engine puts in."""
    factors: list[Tensor] = []
    loss.register_hook(factors.append)

    def gradient() -> Tensor:
        if probe.grad is None:
            return torch.zeros_like(probe)
        return probe.grad / factors[0]

    return gradient


class CompiledLoss:
    """Loss, sums and the gradients of all parameters in one graph, for each shape of batch.

    Steps that measure the tasks' gradients have a graph of their own, made when the first of them comes: in every step
    the measurement would cost 6%.
    """

    def __init__(self, model: AtomisticModel) -> None:
        self.model = model
        self._graphs: dict[tuple[Any, ...], tuple[Any, list[bool]]] = {}

    def __call__(
        self, batch: GraphBatch, counts: Tensor, objective: Objective, measuring: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the loss, whose gradients are at hand, the sums, and the gradients of the tasks if it measures."""
        probes = [new_probe(self.model)] if measuring else []
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        key = (measuring, layout_key(batch))
        layout = BatchTensors(batch)
        given = [counts, objective.task_weights, objective.weights]
        rest = [*given, *self._fixed().values(), *layout.flat(batch), *probes]
        if key not in self._graphs:
            self._graphs[key] = self._trace(layout, objective, parameters, rest)
        graph, used = self._graphs[key]
        loss, sums, *measured = _GradientsAtHand.apply(graph, used, rest, *parameters)
        return loss, sums, measured[0] if measured else None

    def _fixed(self) -> dict[str, Tensor]:
        """Weights that are not trained, and buffers."""
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(self.model.named_buffers())}

    def _trace(
        self, layout: BatchTensors, objective: Objective, parameters: Sequence[Tensor], rest: Sequence[Tensor]
    ) -> tuple[Any, list[bool]]:
        used = [True] * len(parameters)
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        fixed, wide = list(self._fixed()), self.model.dtype

        def step(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            # Gradients of weights in lower precision are handed over whole: they are rounded once, by autograd.
            weights = [tensor.detach().to(wide).requires_grad_() for tensor in tensors[: len(trained)]]
            counts, task_weights, quantity_weights, *held = tensors[len(trained) :]
            others, held = held[: len(fixed)], held[len(fixed) :]
            now = layout.batch(held[: len(layout.names)])
            probes = [probe.detach().requires_grad_() for probe in held[len(layout.names) :]]
            state = dict(zip([*trained, *fixed], [*weights, *others], strict=True))
            weighted = replace(objective, task_weights=task_weights, weights=quantity_weights)
            sums = weighted.sums(functional_call(self.model, state, (now, *probes)), now)
            loss = weighted.total(sums, counts)
            gradients = torch.autograd.grad(loss, [*weights, *probes], allow_unused=True)
            used[:] = [gradient is not None for gradient in gradients[: len(weights)]]
            return (
                loss.detach(),
                sums.detach(),
                *gradients[len(weights) :],
                *(gradient for gradient in gradients[: len(weights)] if gradient is not None),
            )

        return compile_traced(step, [*parameters, *rest]), used


class _GradientsAtHand(Function):
    """Runs a graph that gives loss, sums and gradients; backward hands the gradients over, so hooks fire as ever."""

    @staticmethod
    def forward(ctx: Any, graph: Any, used: list[bool], rest: list[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        loss, sums, *found = graph([*parameters, *rest])
        count = sum(used)
        measured, gradients = found[: len(found) - count], found[len(found) - count :]
        ctx.used, ctx.gradients = used, gradients
        ctx.mark_non_differentiable(sums, *measured)
        return loss, sums, *measured

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = iter(ctx.gradients)
        factor = grads[0]
        handed = [next(found) if used else None for used in ctx.used]
        ctx.gradients = []
        return None, None, None, *(None if g is None else g * factor.to(g.dtype) for g in handed)
