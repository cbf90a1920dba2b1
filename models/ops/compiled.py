"""Graphs of complete computations including their derivatives, traced once for the shapes of a batch, then compiled.

Derivatives are part of the trace. Compiling energies and forces alone and differentiating the result would give wrong
gradients of the parameters without an error: tensors that autograd saves are detached in the trace, which cuts second
derivatives.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from hydrazero.models.atomistic import AtomisticModel, Predictions
from hydrazero.models.ops.compiler_cache import remove_cut_off_files
from hydrazero.models.ops.freed_memory import keep_freed_memory
from hydrazero.models.ops.kernels import KernelsUnavailable, left_to_plain_pytorch, load_kernels
from hydrazero.shards.graphs.graph import GraphBatch

PLAIN = ("interaction", "reference", "forces", "stress", "spread")
"""Predictions that every model has."""

_ONE_AT_A_TIME = threading.RLock()
"""Held while a graph is traced, compiled or run: PyTorch refuses to run a compiled graph in one thread while another
thread traces."""

Function = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
Call = Callable[[AtomisticModel, GraphBatch], tuple[Tensor, ...]]


class CompilationError(RuntimeError):
    """A graph could not be compiled: no compiler, no disk space, or the compiler failed; the message says which."""


def compile_traced(function: Function, inputs: Sequence[Tensor]) -> Function:
    """Trace a function of tensors, without running it, at the shapes of `inputs`, and compile the graph.

    The function may take derivatives itself; the compiled one takes tensors of the same shapes and cannot be
    differentiated. It raises CompilationError at its first call if the compiler fails.
    """
    plain = [tensor.detach() for tensor in inputs]
    with torch.enable_grad():
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(plain)
    # Remove what autograd would only need for inputs that nobody differentiates, kernels among it.
    graph.graph.eliminate_dead_code()
    graph.recompile()
    remove_cut_off_files()
    keep_freed_memory()
    compiled = torch.compile(graph, fullgraph=True, dynamic=False)

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        try:
            with torch.no_grad():
                out: tuple[Tensor, ...] = compiled([tensor.detach() for tensor in tensors])
        except (TorchDynamoException, InductorError, OSError) as error:
            cause = getattr(error, "inner_exception", error)  # of an exception that only says which backend failed
            lines = str(cause).strip().splitlines() or [type(cause).__name__]
            raise CompilationError(f"{type(cause).__name__}: {lines[0]}") from error
        return out

    return run


def sharing_weights(model: AtomisticModel) -> AtomisticModel:
    """Return a copy of a model with modules of its own but the same weights.

    Tracing exchanges the weights in the modules for placeholders, which other threads must not meet.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def use_kernels(model: AtomisticModel) -> str | None:
    """Switch a model on the CPU to the C++ kernels; return the reason if they are not available, else None."""
    if model.references.device.type != "cpu":
        return None  # on a GPU the compiler generates the kernels
    try:
        load_kernels()
    except KernelsUnavailable as reason:
        return str(reason)
    model.kernels = True
    return None


def slow_sums(model: AtomisticModel) -> str | None:
    """Return why the kernels of a model that uses them leave its sums over neighbours to plain PyTorch; None if not."""
    degree = model.encoder.sum_degree
    if degree is None or not model.kernels:
        return None
    return left_to_plain_pytorch(model.settings.encoder.features, degree)


class BatchTensors:
    """Conversion of batches to flat lists of tensors and back; all batches of a compiled graph have the same layout."""

    def __init__(self, batch: GraphBatch) -> None:
        self.names = [name for name, value in batch.to_dict().items() if isinstance(value, Tensor)]

    def flat(self, batch: GraphBatch) -> list[Tensor]:
        """Return the tensors of a batch in a fixed order."""
        return [batch[name] for name in self.names]

    def batch(self, tensors: Sequence[Tensor]) -> GraphBatch:
        """Return the batch of tensors in that order."""
        return GraphBatch(**dict(zip(self.names, tensors, strict=True)))


def layout_key(batch: GraphBatch) -> tuple[Any, ...]:
    """Return what a compiled graph depends on: names, shapes and types of a batch's tensors."""
    return tuple(
        (name, tuple(value.shape), value.dtype) for name, value in batch.to_dict().items() if isinstance(value, Tensor)
    )


class CompiledModel:
    """A model that predicts by compiled graphs, one for each shape of batch and kind of prediction."""

    def __init__(self, model: AtomisticModel) -> None:
        self.model = model
        self._graphs: dict[tuple[Any, ...], tuple[BatchTensors, Function]] = {}

    def __call__(self, batch: GraphBatch) -> Predictions:
        """Return the predictions of the model in evaluation mode."""

        def predict(model: AtomisticModel, given: GraphBatch) -> tuple[Tensor, ...]:
            out: Predictions = model(given)
            return *(getattr(out, name) for name in PLAIN), *out.targets.values()

        found = self._run(predict, batch)
        targets = dict(zip(self.model.targets.facts, found[len(PLAIN) :], strict=True))
        return Predictions(**dict(zip(PLAIN, found, strict=False)), targets=targets)

    def energies_of_all_tasks(self, batch: GraphBatch) -> Tensor:
        """Return the result of the model's method of this name, in eV, [S, T] float64."""
        return self.members_of_all_tasks(batch).mean(2)

    def members_of_all_tasks(self, batch: GraphBatch) -> Tensor:
        """Return the result of the model's method of this name, in eV, [S, T, M] float64."""

        def members(model: AtomisticModel, given: GraphBatch) -> tuple[Tensor, ...]:
            return (model.members_of_all_tasks(given),)

        return self._run(members, batch)[0]

    def members_and_forces(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """Return the results of the model's method of this name: eV, [S, T, M] float64, and eV/Å, [A, 3]."""

        def members_and_forces(model: AtomisticModel, given: GraphBatch) -> tuple[Tensor, ...]:
            return model.members_and_forces(given)

        members, forces = self._run(members_and_forces, batch)
        return members, forces

    def _run(self, call: Call, batch: GraphBatch) -> tuple[Tensor, ...]:
        key = (call.__name__, layout_key(batch))
        with _ONE_AT_A_TIME:
            if key not in self._graphs:
                training = self.model.training
                self.model.eval()
                self._graphs[key] = self._trace(call, batch)
                self.model.train(training)
            layout, graph = self._graphs[key]
            return graph([*self.model.parameters(), *self.model.buffers(), *layout.flat(batch)])

    def _trace(self, call: Call, batch: GraphBatch) -> tuple[BatchTensors, Function]:
        names = [name for name, _ in [*self.model.named_parameters(), *self.model.named_buffers()]]
        layout, caller = BatchTensors(batch), _Caller(self.model, call)

        def function(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            state = {f"model.{name}": tensor for name, tensor in zip(names, tensors, strict=False)}
            out: tuple[Tensor, ...] = functional_call(caller, state, (layout.batch(tensors[len(names) :]),))
            return out

        weights = [*self.model.parameters(), *self.model.buffers()]
        return layout, compile_traced(function, [*weights, *layout.flat(batch)])


class _Caller(nn.Module):
    """A module whose call is a method of a model, in the form that `functional_call` needs."""

    def __init__(self, model: AtomisticModel, call: Call) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, batch: GraphBatch) -> tuple[Tensor, ...]:
        return self._call(self.model, batch)
