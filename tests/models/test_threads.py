"""Threads: what several of them compute with one potential is what one computes alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.mep import NEB
from structures import CUTOFF, facts, rattled_molecule

from hydrazero.models import Potential
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.ops.compiled import CompiledModel, sharing_weights
from hydrazero.shards.graphs.neighbours import half_pairs

THREADS = 8


def metal_potential(encoder: str = "painn") -> Potential:
    torch.manual_seed(1)
    settings = EncoderSettings(encoder=encoder, features=16, layers=1, radial_functions=8, cutoff=CUTOFF)
    task = facts("metals", elements=["Cu"], reference_energies={"Cu": -3.0})
    return Potential(AtomisticModel(ModelSettings(encoder=settings, head_features=8), [task]).double())


def copper(seed: int) -> Atoms:
    """Return a cell whose number of atoms, and so of pairs, depends on the seed."""
    atoms = bulk("Cu", cubic=True).repeat((1 + seed % 3, 1, 1))
    atoms.rattle(0.1, seed=seed)
    return atoms


def in_threads(work: Callable[[int], object], count: int = THREADS) -> list[object]:
    """Return the results of calls that begin together."""
    together = threading.Barrier(count)

    def begin(number: int) -> object:
        together.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_a_calculator_in_each_thread_gives_what_one_alone_gives():
    potential = metal_potential()
    cells = [copper(seed) for seed in range(64)]
    alone = potential.calculator("metals")
    expected = [(alone.get_potential_energy(atoms), alone.get_forces(atoms)) for atoms in cells]

    def work(number: int) -> list[tuple[int, float, np.ndarray]]:
        calculator = potential.calculator("metals")
        order = np.roll(np.arange(64), 8 * number)[:24].tolist()
        return [(n, calculator.get_potential_energy(cells[n]), calculator.get_forces(cells[n])) for n in order]

    for found in in_threads(work):
        for n, energy, forces in found:
            assert energy == expected[n][0] and np.array_equal(forces, expected[n][1])


def test_one_calculator_may_serve_several_threads():
    calculator = metal_potential().calculator("metals")
    expected = [calculator.get_potential_energy(copper(n)) for n in range(THREADS)]
    found = in_threads(lambda n: [calculator.get_potential_energy(copper(n)) for _ in range(10)])
    assert found == [[energy] * 10 for energy in expected]


def test_predictions_and_neighbours_in_threads():
    potential = metal_potential()
    cells = [copper(seed) for seed in range(24)]
    expected = [row["energy"] for row in potential.predict(cells)]
    pairs = [half_pairs(atoms.positions, atoms.cell[:], atoms.pbc, CUTOFF) for atoms in cells]

    def work(number: int) -> bool:
        for atoms, right in zip(cells, pairs, strict=True):
            found = half_pairs(atoms.positions, atoms.cell[:], atoms.pbc, CUTOFF)
            assert np.array_equal(found.first, right.first) and np.array_equal(found.shift, right.shift)
        return [row["energy"] for row in potential.predict(cells)] == expected

    assert all(in_threads(work))


def test_images_of_an_elastic_band_run_in_threads():
    potential = metal_potential()
    bands = []
    for parallel in (False, True):
        first, last = copper(0), copper(3)
        last.set_cell(first.cell)
        images = [first, *(first.copy() for _ in range(6)), last]
        for image in images:
            image.calc = potential.calculator("metals")
        band = NEB(images, parallel=parallel, method="improvedtangent")
        band.interpolate(mic=True)
        bands.append((band.get_forces(), band.get_potential_energy()))
    assert np.array_equal(bands[0][0], bands[1][0]) and bands[0][1] == bands[1][1]


def test_a_model_may_be_traced_in_one_thread_and_used_in_another(monkeypatch):
    """While weights are exchanged for placeholders in one thread, the others compute with the weights."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    potential = metal_potential()
    cells = [copper(3 * seed) for seed in range(4)]
    expected = [row["energy"] for row in potential.predict(cells)]

    def work(number: int) -> list[float]:
        if number % 2:
            return [row["energy"] for _ in range(20) for row in potential.predict(cells)][-4:]
        calculator = potential.calculator("metals", compile=True)
        return [calculator.get_potential_energy(atoms) for atoms in cells]

    for found in in_threads(work, 2):
        assert found == pytest.approx(expected, abs=1e-9)


def test_a_copy_for_the_compiler_shares_weights_and_nothing_else():
    model = metal_potential().model
    copy = sharing_weights(model)
    ours, theirs = dict(model.named_parameters()), dict(copy.named_parameters())
    assert all(ours[name] is theirs[name] for name in ours) and ours.keys() == theirs.keys()
    modules = {id(module) for module in model.modules()}
    assert not modules & {id(module) for module in copy.modules()}
    assert CompiledModel(copy).model.energy_head is not model.energy_head


def test_water_in_threads_with_several_cutoffs():
    """More cutoffs than a thread keeps engines for."""
    atoms = rattled_molecule()
    cutoffs = np.linspace(1.5, 5.0, 12)
    none = np.zeros(3, dtype=bool)
    counts = [len(half_pairs(atoms.positions, np.zeros((3, 3)), none, cutoff).first) for cutoff in cutoffs]

    def work(number: int) -> list[int]:
        return [len(half_pairs(atoms.positions, np.zeros((3, 3)), none, cutoff).first) for cutoff in cutoffs]

    assert in_threads(work) == [counts] * THREADS and counts == sorted(counts) and counts[-1] > counts[0]
