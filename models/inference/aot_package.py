"""Packages of one task, compiled ahead of time, that PyTorch runs without this library.

A package is an AOTInductor archive (`torch._inductor.aoti_load_package`, or `AOTIModelPackageLoader` in C++). Its
inputs describe a structure of A atoms and P pairs of neighbours, each pair once; both numbers may change between calls:

    numbers [A] int64, positions [A, 3] Å, first [P] int64, second [P] int64, shifts [P, 3] Å, cell [3, 3] Å

Packages of tasks that depend on charge and spin also take charge [1] int64 and multiplicity [1] int64. The vector of a
pair is positions[second] + shifts - positions[first]; pairs beyond the cutoff add nothing. The cell is that to whose
volume the stress refers; it must be zero if the structure is not periodic or the cell lacks a vector. The outputs are
energy [1] eV float64, forces [A, 3] eV/Å, stress [3, 3] eV/Å³ (zero without a cell), and then the task's other
quantities. All of them are NaN if an atom is of an element that is not in the task's training data, if an atomic
number is not valid, or if the task needs a multiplicity and it is below 1. `get_metadata()` returns the names of inputs
and outputs, the precision, the cutoff in Å and the model card.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.model_file import probe_structure
from hydrazero.models.ops.compiler_cache import remove_cut_off_files
from hydrazero.models.task_facts import known_elements
from hydrazero.shards.errors import ModelFileError
from hydrazero.shards.files import replacing
from hydrazero.shards.graphs.graph import GraphBatch, collate, graph_sample, shape_holding
from hydrazero.shards.structure import MAX_ATOMIC_NUMBER, Structure

GEOMETRY = ("numbers", "positions", "first", "second", "shifts", "cell")
CONDITIONS = ("charge", "multiplicity")
RESULTS = ("energy", "forces", "stress")
SUFFIX = ".pt2"

Function = Callable[..., tuple[Tensor, ...]]


def package_inputs(model: AtomisticModel, structure: Structure) -> list[Tensor]:
    """Return the inputs of a package of the model's only task for a structure."""
    pairs = graph_sample(structure, 0, model.settings.encoder.cutoff).pairs
    integer, number = torch.int64, model.dtype
    shifts = torch.zeros(len(pairs.first), 3) if pairs.shift is None else torch.from_numpy(pairs.shift)
    cell = torch.from_numpy(structure.cell) * bool(structure.volume)
    inputs = [
        torch.from_numpy(structure.numbers).to(integer),
        torch.from_numpy(structure.positions).to(number),
        torch.from_numpy(pairs.first.copy()),
        torch.from_numpy(pairs.second.copy()),
        shifts.to(number),
        cell.to(number),
    ]
    if model.tasks[0].charge_spin:
        inputs += [torch.tensor([value], dtype=integer) for value in (structure.charge, structure.multiplicity)]
    return inputs


def package_function(model: AtomisticModel) -> Function:
    """Return a function from a package's inputs to its outputs, for a model of one task.

    The numbers of atoms and pairs may be symbolic, so that the function can be traced for all sizes.
    """

    known = known_elements(model.tasks)[0]
    lowest = 1 if model.tasks[0].multiplicity_known else 0

    def function(
        numbers: Tensor,
        positions: Tensor,
        first: Tensor,
        second: Tensor,
        shifts: Tensor,
        cell: Tensor,
        *conditions: Tensor,
    ) -> tuple[Tensor, ...]:
        pairs, none = first.shape[0], torch.zeros(1, dtype=torch.int64)
        charge, multiplicity = conditions or (none, none)
        # Invalid atomic numbers are replaced by hydrogen, so that no table is read out of bounds.
        element = torch.where((numbers > 0) & (numbers <= MAX_ATOMIC_NUMBER), numbers, torch.ones_like(numbers))
        supported = (known[element] & (element == numbers)).all()
        if conditions:
            supported = supported & (multiplicity >= lowest).all()
        nothing = torch.where(supported, 0.0, torch.nan)
        volume = (cell[0] * torch.linalg.cross(cell[1], cell[2])).sum().abs().reshape(1)
        places = torch.arange(pairs)
        # Each slot is a row of its own, so that a list of pairs needs neither sorting nor padding.
        batch = GraphBatch(
            numbers=element,
            positions=positions - positions.mean(0),
            row_atom=torch.cat([first, second]),
            neighbours=torch.cat([second, first]).unsqueeze(1),
            reverse=torch.cat([places + pairs, places]).unsqueeze(1),
            shifts=torch.cat([shifts, -shifts]).unsqueeze(1),
            slot_mask=torch.ones(2 * pairs, 1, dtype=torch.bool),
            atom_mask=torch.ones(numbers.shape[0], dtype=torch.bool),
            structure=torch.zeros(numbers.shape[0], dtype=torch.int64),
            task=none,
            charge=charge,
            multiplicity=multiplicity,
            volume=torch.where(volume > 0, volume, torch.ones_like(volume)),
            periodic=volume > 0,
        )
        out = model(batch)
        found = (out.energy, out.forces, out.stress[0], *out.targets.values())
        return tuple(value + nothing.to(value.dtype) for value in found)

    return function


def trace_model(model: AtomisticModel) -> tuple[GraphModule, list[Tensor]]:
    """Return the graph of energy and gradients of a model of one task, for any sizes, and the inputs that traced it."""
    example = package_inputs(model, probe_structure(model.tasks[0].elements[:1] * 3))
    with torch.enable_grad():
        graph = make_fx(package_function(model), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, example


def export_program(model: AtomisticModel) -> ExportedProgram:
    """Return the exported program of a model of one task, for any number of atoms and pairs."""
    graph, example = trace_model(model)
    atoms, pairs = Dim("atoms", min=2, max=2**24), Dim("pairs", min=2, max=2**30)
    sizes: list[Any] = [{0: atoms}, {0: atoms}, {0: pairs}, {0: pairs}, {0: pairs}, None]
    sizes += [None] * (len(example) - len(sizes))
    return torch.export.export(graph, tuple(example), dynamic_shapes=tuple(sizes), strict=False)


def write_package(model: AtomisticModel, out: Path, card: dict[str, Any] | None) -> None:
    """Compile the only task of a model into a package, compare its results with the model's, and write it to `out`.

    The package runs on this kind of processor and this version of PyTorch. Raises ModelFileError if the model has
    several tasks, if `out` exists, does not end in '.pt2' or cannot be written, if the compiler fails, or if the
    package gives other results than the model.
    """
    if len(model.tasks) != 1:
        raise ModelFileError(f"a package holds one task, and the model has {len(model.tasks)}; choose one.")
    if out.suffix != SUFFIX:
        raise ModelFileError(f"{out} must end in {SUFFIX}, by which PyTorch recognises its packages.")
    if out.exists():
        raise ModelFileError(f"{out} exists; remove it or choose another name.")
    remove_cut_off_files()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # PyTorch ends the process if a disk is full, so the package is made in the folder that its compiler uses too.
        with TemporaryDirectory() as folder, replacing(out, shared=True) as temporary:
            made = Path(folder) / f"package{SUFFIX}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about PyTorch's own code
                settings = {"aot_inductor.metadata": _facts(model, card)}
                torch._inductor.aoti_compile_and_package(
                    export_program(model), package_path=str(made), inductor_configs=settings
                )
            _compare(model, made)
            shutil.copyfile(made, temporary)
    except OSError as error:
        raise ModelFileError(f"{out} cannot be written ({error.strerror or error}).") from error
    except (InductorError, TorchDynamoException) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelFileError(f"the model cannot be compiled here ({lines[0]}); is there a C++ compiler?") from error


def _facts(model: AtomisticModel, card: dict[str, Any] | None) -> dict[str, str]:
    (task,) = model.tasks
    return {
        "task": task.name,
        "method": task.fidelity,
        "elements": " ".join(task.elements),
        "cutoff": f"{model.settings.encoder.cutoff:g}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "inputs": " ".join(GEOMETRY + CONDITIONS * task.charge_spin),
        "outputs": " ".join([*RESULTS, *model.targets.facts]),
        "card": json.dumps(card or {}, ensure_ascii=False),
    }


def _compare(model: AtomisticModel, path: Path) -> None:
    """Raise ModelFileError unless a package reproduces the model for a cluster of all elements and for a cell."""
    package = torch._inductor.aoti_load_package(str(path))
    tolerance = 1e-10 if model.dtype == torch.float64 else 1e-4
    charge, multiplicity = (1, 2) if model.tasks[0].charge_spin else (0, 0)
    cluster, cell = (
        replace(structure, charge=charge, multiplicity=multiplicity)
        for structure in (probe_structure(model.tasks[0].elements), _cell_of(model.tasks[0].elements[0]))
    )
    for structure in (cluster, cell):
        sample = graph_sample(structure, 0, model.settings.encoder.cutoff)
        expected = model(collate([sample], shape_holding([sample]), model.dtype))
        outputs = package(*package_inputs(model, structure))
        pairs = [(expected.energy, outputs[0]), (expected.forces, outputs[1]), (expected.stress[0], outputs[2])]
        pairs += list(zip(expected.targets.values(), outputs[len(RESULTS) :], strict=True))
        for ours, theirs in pairs:
            limit = tolerance * (1.0 + float(ours.abs().max()))
            if not torch.allclose(ours, theirs.to(ours.dtype), rtol=0.0, atol=limit):
                raise ModelFileError("the package does not reproduce the model; nothing was written.")
    inputs = package_inputs(model, cluster)
    for number in (0, MAX_ATOMIC_NUMBER + 1):
        outputs = package(torch.full_like(inputs[0], number), *inputs[1:])
        if not all(value.isnan().all() for value in outputs):
            raise ModelFileError("the package gives numbers for invalid atomic numbers; nothing was written.")


def _cell_of(symbol: str) -> Structure:
    """Return a skewed cell of two atoms."""
    numbers = torch.tensor([atomic_numbers[symbol]] * 2, dtype=torch.uint8).numpy()
    cell = torch.tensor([[3.0, 0.1, 0.0], [0.0, 3.2, 0.2], [0.3, 0.0, 3.1]], dtype=torch.float64).numpy()
    positions = torch.tensor([[0.0, 0.0, 0.0], [1.6, 1.4, 1.7]], dtype=torch.float64).numpy()
    return Structure(numbers=numbers, positions=positions, cell=cell, pbc=torch.ones(3, dtype=torch.bool).numpy())
