"""Labels of the demo, computed by electronic-structure methods and force fields during the demo."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator

from hydrazero.shards.errors import HydrazeroError, did_you_mean
from hydrazero.shards.files import replacing, write_json
from hydrazero.trainer.demo.structures import (
    SMALL_MOLECULES,
    alloy_cell,
    molecule_names,
    rattled_molecule,
    silicon_cell,
)

LARGEST_FORCE = 15.0
"""Force component in eV/Å from which on a structure is replaced by another, since two of its atoms are too close."""
CHUNK = 10
"""Number of structures that a process labels at a time; each chunk has its own seed, whichever process labels it."""
MOST_DRAWS = 20
"""Maximum number of attempts to draw and label one structure."""
SUMMARY_NAME = "labelling.json"
"""File beside the sources with the seed and, by task, fidelity and numbers of structures and of replaced ones."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that set the number of threads of numerical libraries."""


class DemoError(HydrazeroError):
    """A method of the demo is not installed or does not work."""


@dataclass(frozen=True, kw_only=True)
class DemoTask:
    """One of the demo's datasets."""

    name: str
    """Name of the task."""
    fidelity: str
    """Method of the labels."""
    structures: int
    """Number of structures."""
    draw: Callable[[np.random.Generator], Atoms]
    """Function that draws a structure."""
    label: Callable[[Atoms], dict[str, Any]]
    """Function that returns energy (eV), forces (eV/Å) and, for crystals, stress (eV/Å³, Voigt) of a structure."""


def _missing(package: str) -> DemoError:
    return DemoError(f"the demo needs {package}, which is not installed; run: pip install 'hydrazero[demo]'.")


def _tblite(atoms: Atoms, method: str) -> dict[str, Any]:
    try:
        from tblite.interface import Calculator
    except ImportError as error:
        raise _missing("tblite") from error
    calculator = Calculator(method, atoms.numbers, atoms.positions / units.Bohr)
    calculator.set("verbosity", 0)
    result = calculator.singlepoint()
    forces = -np.asarray(result.get("gradient")) * units.Hartree / units.Bohr
    return {"energy": float(result.get("energy")) * units.Hartree, "forces": forces}


def label_gfn2(atoms: Atoms) -> dict[str, Any]:
    """Label by GFN2-xTB (Bannwarth, Ehlert, Grimme 2019) through tblite."""
    return _tblite(atoms, "GFN2-xTB")


def label_gfn1(atoms: Atoms) -> dict[str, Any]:
    """Label by GFN1-xTB (Grimme, Bannwarth, Shushkov 2017) through tblite."""
    return _tblite(atoms, "GFN1-xTB")


def label_hartree_fock(atoms: Atoms) -> dict[str, Any]:
    """Label by restricted Hartree-Fock in the STO-3G basis through PySCF."""
    try:
        from pyscf import gto, scf
    except ImportError as error:
        raise _missing("pyscf") from error
    geometry = list(zip(atoms.get_chemical_symbols(), atoms.positions.tolist(), strict=True))
    mean_field = scf.RHF(gto.M(atom=geometry, basis="sto-3g", unit="Angstrom", verbose=0))
    energy = mean_field.kernel()
    if not mean_field.converged:
        raise RuntimeError("the self-consistent field did not converge")
    gradient = mean_field.nuc_grad_method().kernel()
    return {"energy": float(energy) * units.Hartree, "forces": -gradient * units.Hartree / units.Bohr}


def label_emt(atoms: Atoms) -> dict[str, Any]:
    """Label by effective medium theory (Jacobsen, Stoltze, Nørskov 1996) as in ASE."""
    from ase.calculators.emt import EMT

    return _with_ase(atoms, EMT())


def label_tersoff(atoms: Atoms) -> dict[str, Any]:
    """Label by Tersoff's potential for silicon (Tersoff 1988, T3) as in ASE."""
    from ase.calculators.tersoff import Tersoff, TersoffParameters

    silicon = TersoffParameters(
        A=1830.8, B=471.18, lambda1=2.4799, lambda2=1.7322, lambda3=0.0, beta=1.1e-6, gamma=1.0, m=3.0,
        n=0.78734, c=1.0039e5, d=16.217, h=-0.59825, R=2.85, D=0.15,
    )  # fmt: skip
    return _with_ase(atoms, Tersoff({("Si", "Si", "Si"): silicon}))


def _with_ase(atoms: Atoms, calculator: Any) -> dict[str, Any]:
    copy = atoms.copy()
    copy.calc = calculator
    stress = copy.get_stress()
    return {"energy": float(copy.get_potential_energy()), "forces": copy.get_forces(), "stress": stress}


def _any_molecule(generator: np.random.Generator) -> Atoms:
    return rattled_molecule(molecule_names(), generator)


def _small_molecule(generator: np.random.Generator) -> Atoms:
    return rattled_molecule(sorted(SMALL_MOLECULES), generator)


DEMO_TASKS = (
    DemoTask(name="gfn2", fidelity="GFN2-xTB", structures=2000, draw=_any_molecule, label=label_gfn2),
    DemoTask(name="gfn1", fidelity="GFN1-xTB", structures=500, draw=_any_molecule, label=label_gfn1),
    DemoTask(name="hf", fidelity="HF/STO-3G", structures=60, draw=_small_molecule, label=label_hartree_fock),
    DemoTask(name="emt", fidelity="EMT", structures=1000, draw=alloy_cell, label=label_emt),
    DemoTask(name="tersoff", fidelity="Tersoff T3", structures=100, draw=silicon_cell, label=label_tersoff),
)


def _label_one(task: DemoTask, generator: np.random.Generator, redrawn: Counter[str]) -> Atoms:
    """Draw and label one structure; count structures that were replaced in `redrawn`, by reason."""
    last = ""
    for _ in range(MOST_DRAWS):
        atoms = task.draw(generator)
        try:
            results = task.label(atoms)
        except HydrazeroError:
            raise
        except Exception as error:  # each method raises its own class if it does not converge
            redrawn["engine_failed"] += 1
            last = str(error)
            continue
        if np.abs(results["forces"]).max() < LARGEST_FORCE:
            atoms.calc = SinglePointCalculator(atoms, **results)
            return atoms
        redrawn["force_too_large"] += 1
        last = f"a force component of {LARGEST_FORCE} eV/Å or more"
    raise DemoError(f"{task.fidelity} gave no usable labels for {MOST_DRAWS} structures in a row (last: {last}).")


def _label_chunk(task_number: int, chunk: int, count: int, seed: int) -> tuple[list[Atoms], Counter[str]]:
    """Draw and label structures; return them and the number of structures that were replaced, by reason."""
    generator = np.random.default_rng((seed, task_number, chunk))
    redrawn: Counter[str] = Counter()
    return [_label_one(DEMO_TASKS[task_number], generator, redrawn) for _ in range(count)], redrawn


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that are started in the block compute with one thread; restore this process's environment after it.

    A process reads these variables when it loads its numerical libraries, so they must be set before it starts.
    """
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def make_demo_sources(
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    counts: Mapping[str, int] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Path]:
    """Label structures for every task, write `out`/TASK.extxyz, and return the files by task.

    The files depend on `seed` and `counts` (numbers of structures by task; by default those of DEMO_TASKS), but not on
    `workers`, the number of processes. A structure for which the method fails, or with a force component of
    LARGEST_FORCE or more, is replaced by another; SUMMARY_NAME contains the numbers of these. `progress` is called with
    a task's name and the number of its structures that were labelled since the last call. Raise DemoError if `counts`
    has an unknown task, a method is not installed or fails MOST_DRAWS times in a row, or a process dies.
    """
    known = [task.name for task in DEMO_TASKS]
    counts = {task.name: task.structures for task in DEMO_TASKS} if counts is None else counts
    for name in counts:
        if name not in known:
            raise DemoError(f"the demo has no task '{name}'{did_you_mean(name, known)}.")
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    summary: dict[str, Any] = {"seed": seed, "largest_force_ev_per_angstrom": LARGEST_FORCE, "tasks": {}}
    with _one_thread_each(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            jobs = _submit(pool, counts, seed)
            for task in DEMO_TASKS:
                frames, redrawn = _gather(task.name, jobs[task.name], progress)
                if frames:
                    files[task.name] = _write(frames, out / f"{task.name}.extxyz")
                    facts = {"fidelity": task.fidelity, "structures": len(frames), "redrawn": dict(redrawn)}
                    summary["tasks"][task.name] = facts
        except BrokenProcessPool as error:
            raise DemoError("a process that labels structures was killed; the machine may be out of memory.") from error
        finally:
            pool.shutdown(cancel_futures=True)  # otherwise an error would wait for all remaining structures
    write_json(out / SUMMARY_NAME, summary)
    return files


Chunk = Future[tuple[list[Atoms], Counter[str]]]


def _submit(pool: ProcessPoolExecutor, counts: Mapping[str, int], seed: int) -> dict[str, list[Chunk]]:
    """Submit the chunks of every task to the pool, and return them by task, in order."""
    return {
        task.name: [
            pool.submit(_label_chunk, number, chunk, min(CHUNK, counts[task.name] - first), seed)
            for chunk, first in enumerate(range(0, counts.get(task.name, 0), CHUNK))
        ]
        for number, task in enumerate(DEMO_TASKS)
    }


def _gather(
    name: str, chunks: list[Chunk], progress: Callable[[str, int], None] | None
) -> tuple[list[Atoms], Counter[str]]:
    """Wait for a task's chunks; return its labelled structures and the number of replaced ones, by reason."""
    frames: list[Atoms] = []
    redrawn: Counter[str] = Counter()
    for chunk in chunks:
        more, again = chunk.result()
        frames += more
        redrawn += again
        if progress is not None:
            progress(name, len(more))
    return frames, redrawn


def _write(frames: list[Atoms], path: Path) -> Path:
    with replacing(path) as part:
        ase.io.write(part, frames, format="extxyz")
    return path
