"""What every encoder must hold: symmetries, exact derivatives, smoothness, independence of batches and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from scipy.spatial.transform import Rotation
from structures import CUTOFF, batch_of, predict, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.models.encoders import ENCODERS

VARIANTS = [
    (encoder, cutoff, basis)
    for encoder in ENCODERS.builtin
    for cutoff, basis in (("cosine", "sinc"), ("polynomial", "gaussian"))
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(variant))
def model(request: pytest.FixtureRequest):
    encoder, cutoff, basis = request.param
    return small_model(encoder, cutoff_function=cutoff, radial_basis=basis)


@pytest.fixture(params=["molecule", "crystal"])
def atoms(request: pytest.FixtureRequest) -> Atoms:
    return rattled_molecule() if request.param == "molecule" else rattled_crystal()


def transformed(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    turned = atoms.copy()
    turned.set_cell(atoms.cell[:] @ matrix.T)
    turned.set_positions(atoms.positions @ matrix.T)
    return turned


@pytest.mark.parametrize("reflect", [False, True])
def test_rotation_and_reflection(model, atoms, reflect):
    matrix = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix() * (-1 if reflect else 1)
    before, after = predict(model, atoms), predict(model, transformed(atoms, matrix))
    turn = torch.tensor(matrix)
    torch.testing.assert_close(after.interaction, before.interaction, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.forces, before.forces @ turn.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.stress[0], turn @ before.stress[0] @ turn.T, rtol=0, atol=1e-10)


def test_translation(model, atoms):
    moved = atoms.copy()
    moved.translate([1.3, -20.0, 0.2])
    before, after = predict(model, atoms), predict(model, moved)
    torch.testing.assert_close(after.interaction, before.interaction, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.forces, before.forces, rtol=0, atol=1e-10)


def test_wrapping_into_the_cell_changes_nothing(model):
    atoms = rattled_crystal()
    wrapped = atoms.copy()
    wrapped.positions[2] += 3 * wrapped.cell[0] - wrapped.cell[2]
    torch.testing.assert_close(predict(model, wrapped).forces, predict(model, atoms).forces, rtol=0, atol=1e-10)


def test_permutation(model, atoms):
    order = np.random.default_rng(1).permutation(len(atoms))
    before, after = predict(model, atoms), predict(model, atoms[order])
    torch.testing.assert_close(after.interaction, before.interaction, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.forces, before.forces[torch.tensor(order)], rtol=0, atol=1e-10)


def test_forces_are_the_gradient_of_the_energy(model, atoms):
    forces = predict(model, atoms).forces
    step = 1e-4
    for atom, axis in ((0, 0), (1, 2), (len(atoms) - 1, 1)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            energies.append(float(predict(model, moved).interaction))
        assert float(forces[atom, axis]) == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=1e-6)


def test_stress_is_the_strain_derivative_of_the_energy(model):
    atoms = rattled_crystal()
    stress = predict(model, atoms).stress[0]
    step = 1e-4
    for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell[:] @ strain, scale_atoms=True)
            energies.append(float(predict(model, strained).interaction))
        slope = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
        assert float(stress[i, j]) == pytest.approx(slope, abs=1e-7)


def test_energy_is_extensive(model):
    atoms = rattled_crystal()
    one, eight = predict(model, atoms), predict(model, atoms * (2, 2, 2))
    assert float(eight.interaction) == pytest.approx(8 * float(one.interaction), rel=1e-10)
    apart = rattled_molecule() + rattled_molecule("H2O")
    apart.positions[9:] += 50.0
    whole = float(predict(model, apart).interaction)
    parts = float(predict(model, rattled_molecule()).interaction) + float(
        predict(model, rattled_molecule("H2O")).interaction
    )
    assert whole == pytest.approx(parts, rel=1e-10)


def test_atoms_without_neighbours_keep_their_element(model):
    energies = [float(predict(model, Atoms(symbol)).interaction) for symbol in ("H", "C", "O")]
    assert len({round(energy, 6) for energy in energies}) == 3


def test_smooth_at_the_cutoff(model):
    """Energy and force of a pair go on without a jump when the pair leaves the cutoff."""

    def at(distance: float):
        trimer = Atoms("OHC", positions=[[0, 0, 0], [distance, 0, 0], [0.3, 1.1, 0]])
        return predict(model, trimer)

    gap = 1e-5
    inside, outside = at(CUTOFF - gap), at(CUTOFF + gap)
    torch.testing.assert_close(inside.interaction, outside.interaction, rtol=0, atol=1e-7)
    torch.testing.assert_close(inside.forces, outside.forces, rtol=0, atol=1e-4)
    assert not torch.equal(at(CUTOFF - 0.3).interaction, outside.interaction)


def test_forces_grow_with_the_displacement_at_sites_of_high_symmetry(model):
    """Where node vectors vanish, roots of their squares must not make a kink: phonons are taken there."""
    crystal = bulk("NaCl", "rocksalt", a=5.6, cubic=True) * (2, 1, 1)

    def force_constants(atom: int, displacement: float) -> np.ndarray:
        forces = []
        for sign in (1, -1):
            atoms = crystal.copy()
            atoms.positions[atom, 0] += sign * displacement
            forces.append(predict(model, atoms).forces.detach().numpy())
        return (forces[1] - forces[0])[:, 0] / (2 * displacement)

    small, large = force_constants(0, 0.002), force_constants(0, 0.01)
    np.testing.assert_allclose(small, large, atol=0.03 * np.abs(large).max())
    neighbour = int(np.argsort(-np.abs(large))[1])
    assert force_constants(neighbour, 0.01)[0] == pytest.approx(large[neighbour], abs=0.01 * np.abs(large).max())


def test_a_batch_gives_what_single_structures_give(model):
    many = [rattled_molecule(), rattled_crystal(), molecule("H2O"), bulk("Cu")]
    tasks = [0, 1, 1, 0]
    together = predict(model, many, tasks)
    first = 0
    for number, atoms in enumerate(many):
        alone = predict(model, atoms, [tasks[number]])
        torch.testing.assert_close(together.interaction[number], alone.interaction[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(together.forces[first : first + len(atoms)], alone.forces, rtol=0, atol=1e-10)
        torch.testing.assert_close(together.stress[number], alone.stress[0], rtol=0, atol=1e-10)
        first += len(atoms)


def test_padding_changes_nothing(model, atoms):
    structure = to_structure(atoms)
    plain = model(batch_of([structure]))
    padded = model(batch_of([structure], extra=(3, 17, 5)))
    torch.testing.assert_close(padded.interaction[0], plain.interaction[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(padded.forces[: len(atoms)], plain.forces, rtol=0, atol=1e-10)
    assert torch.isfinite(padded.forces).all()
    assert (padded.forces[len(atoms) :] == 0).all() and (padded.interaction[1:] == 0).all()


def test_parameter_gradients_do_not_see_padding(model, atoms):
    structure = to_structure(atoms)
    gradients = []
    for batch in (batch_of([structure]), batch_of([structure], extra=(2, 9, 3))):
        model.train()
        predictions = model(batch)
        loss = (predictions.interaction**2).sum() + (predictions.forces**2).sum() + (predictions.stress**2).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for plain, padded in zip(*gradients, strict=True):
        assert (plain is None) == (padded is None)
        if plain is not None:
            assert torch.isfinite(padded).all()
            torch.testing.assert_close(padded, plain, rtol=1e-9, atol=1e-10)


def test_every_parameter_learns_from_energy_and_forces(model):
    model.train()
    predictions = model(batch_of([to_structure(rattled_molecule()), to_structure(rattled_crystal())], [0, 1]))
    ((predictions.interaction**2).sum() + (predictions.forces**2).sum()).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_single_atom_and_no_edges(model):
    for lonely in (Atoms("O"), Atoms("OO", positions=[[0, 0, 0], [CUTOFF + 2, 0, 0]])):
        predictions = predict(model, lonely)
        assert torch.isfinite(predictions.interaction).all()
        assert (predictions.forces == 0).all()


def test_an_atom_sees_as_far_as_the_encoder_says_and_no_farther(model):
    """A zigzag chain whose bonds are nearly a cutoff long: one hop brings the next atom."""
    hops = round(model.encoder.receptive_radius / CUTOFF)
    places = np.arange(hops + 2)
    chain = Atoms(["C"] * len(places), positions=np.stack([0.8 * CUTOFF * places, 1.2 * (places % 2), 0.0 * places], 1))

    def first_atom(symbol: str, place: int) -> torch.Tensor:
        atoms = chain.copy()
        atoms.symbols[place] = symbol
        batch = batch_of([to_structure(atoms)])
        strain = torch.zeros(1, 3, 3, dtype=torch.float64)
        return model._encode(batch, batch.task, batch.positions, strain)[0].scalars[0].detach()

    same = first_atom("C", 0)
    assert torch.equal(first_atom("O", hops + 1), same)
    assert not torch.equal(first_atom("O", hops), same)


def test_float32_agrees_with_float64(model, atoms):
    exact = predict(model, atoms)
    rounded = predict(model.to(torch.float32), atoms)
    assert rounded.forces.dtype == torch.float32
    torch.testing.assert_close(rounded.forces.double(), exact.forces, rtol=1e-3, atol=2e-4)
    assert rounded.energy.dtype == torch.float64
    torch.testing.assert_close(rounded.reference, exact.reference, rtol=0, atol=0)


def test_tasks_differ_and_all_tasks_come_in_one_pass(model, atoms):
    structure = to_structure(atoms)
    every = model.energies_of_all_tasks(batch_of([structure]))[0]
    for task in range(2):
        torch.testing.assert_close(model(batch_of([structure], [task])).energy[0], every[task], rtol=0, atol=1e-9)
    assert abs(float(every[0] - every[1])) > 1e-6


def test_gradients_of_slots_equal_those_of_plain_indexing():
    """The gathers' own derivatives, to second order, against autograd through ordinary indexing."""
    from hydrazero.models.ops.slots import slots_of

    batch = batch_of([to_structure(rattled_crystal()), to_structure(rattled_molecule())], extra=(0, 3, 2))
    x = torch.randn(batch.numbers.shape[0], 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*batch.neighbours.shape, 4, dtype=torch.float64) * batch.slot_mask.unsqueeze(-1)

    def second(gathered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (first,) = torch.autograd.grad((weight * gathered**3).sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad((first**2).sum(), x)
        return first, curve

    slots = slots_of(batch)
    ours = second(slots.gather(x))
    plain = second(x[batch.neighbours])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
