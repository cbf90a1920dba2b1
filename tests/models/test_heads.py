"""Heads for other quantities than conservative energies and forces: symmetry, masks, conditions, uncertainty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from scipy.spatial.transform import Rotation
from structures import CUTOFF, batch_of, facts, predict, rattled_crystal, rattled_molecule, to_structure

from hydrazero.models import Potential, load_model, save_model
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders import ENCODERS
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.inference.model_file import with_tasks
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.ops.compiled import CompiledModel, use_kernels
from hydrazero.models.task_facts import TargetFacts
from hydrazero.shards.errors import ConfigError, StructureError
from hydrazero.trainer.config.sections import LossSection
from hydrazero.trainer.engine.losses import make_objective
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss

GAP = TargetFacts(of="structure", kind="scalar", unit="eV", mean=2.0, scale=0.5)
VOLUME = TargetFacts(of="structure", kind="scalar", unit="", extensive=True, mean=10.0, scale=3.0)
CHARGES = TargetFacts(of="atom", kind="scalar", unit="e", scale=0.2)
DIPOLES = TargetFacts(of="atom", kind="vector", unit="eÅ", scale=0.1)
DIPOLE = TargetFacts(of="structure", kind="vector", unit="eÅ", scale=0.1)
ALL_TARGETS = {"gap": GAP, "type": GAP, "volume": VOLUME, "charges": CHARGES, "dipoles": DIPOLES, "dipole": DIPOLE}


def model_of(*tasks: dict, encoder: str = "painn", layers: int = 2, **settings: object) -> AtomisticModel:
    torch.manual_seed(2)
    size = EncoderSettings(encoder=encoder, features=16, layers=layers, radial_functions=8, cutoff=CUTOFF)
    return (
        AtomisticModel(
            ModelSettings(encoder=size, head_features=8, **settings),  # type: ignore[arg-type]
            [facts(f"task{n}", **values) for n, values in enumerate(tasks)],
        )
        .double()
        .eval()
    )


def turned(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    out = atoms.copy()
    out.set_cell(atoms.cell[:] @ matrix.T)
    out.set_positions(atoms.positions @ matrix.T)
    return out


@pytest.mark.parametrize("encoder", [name for name in ENCODERS.builtin if ENCODERS.get(name).has_vectors])
@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("atoms", [rattled_molecule(), rattled_crystal()], ids=["molecule", "crystal"])
def test_direct_heads_and_targets_turn_with_the_structure(atoms, reflect, encoder):
    task = {"forces": "direct", "stress": "direct", "targets": ALL_TARGETS}
    model = model_of(task, encoder=encoder, attention_targets=("gap",))
    matrix = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix() * (-1 if reflect else 1)
    before, after, turn = predict(model, atoms), predict(model, turned(atoms, matrix)), torch.tensor(matrix)
    assert before.forces.abs().max() > 1e-4
    torch.testing.assert_close(after.forces, before.forces @ turn.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.stress[0], turn @ before.stress[0] @ turn.T, rtol=0, atol=1e-10)
    for name in ("gap", "volume", "charges"):
        torch.testing.assert_close(after.targets[name], before.targets[name], rtol=0, atol=1e-10)
    for name in ("dipoles", "dipole"):
        torch.testing.assert_close(after.targets[name], before.targets[name] @ turn.T, rtol=0, atol=1e-10)


def test_direct_stress_tells_shear_where_every_site_is_a_centre_of_inversion():
    """In this crystal all node vectors are zero, and stay zero under any homogeneous strain."""
    model = model_of({"forces": "direct", "stress": "direct"})
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    (still,) = predict(model, atoms).stress
    torch.testing.assert_close(still, still[0, 0] * torch.eye(3, dtype=still.dtype), rtol=0, atol=1e-10)
    strain = np.eye(3)
    strain[0, 1] = strain[1, 0] = 0.03
    atoms.set_cell(atoms.cell[:] @ strain, scale_atoms=True)
    (sheared,) = predict(model, atoms).stress
    assert abs(float(sheared[0, 1])) > 1e-3 * abs(float(still[0, 0]))
    torch.testing.assert_close(sheared, sheared.T, rtol=0, atol=1e-12)


def test_intensive_and_extensive_targets():
    model = model_of({"targets": ALL_TARGETS}, attention_targets=("gap",))
    atoms = rattled_crystal()
    one, eight = predict(model, atoms).targets, predict(model, atoms * (2, 2, 2)).targets
    torch.testing.assert_close(eight["gap"], one["gap"], rtol=0, atol=1e-10)
    torch.testing.assert_close(eight["volume"], 8 * one["volume"], rtol=1e-10, atol=0)


def test_targets_of_a_batch_are_those_of_single_structures_whatever_the_padding():
    model = model_of({"targets": ALL_TARGETS}, {"targets": {"gap": GAP}, "forces": "direct", "stress": "direct"})
    many, tasks = [rattled_molecule(), rattled_crystal(), rattled_molecule("H2O")], [0, 1, 0]
    batch = batch_of([to_structure(atoms) for atoms in many], tasks, extra=(2, 7, 3))
    together, first = model(batch), 0
    for number, atoms in enumerate(many):
        alone, last = predict(model, atoms, [tasks[number]]), first + len(atoms)
        torch.testing.assert_close(together.forces[first:last], alone.forces, rtol=0, atol=1e-10)
        for name, facts_of in ALL_TARGETS.items():
            got = together.targets[name][first:last] if facts_of.of == "atom" else together.targets[name][number]
            expected = alone.targets[name] if facts_of.of == "atom" else alone.targets[name][0]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
        first = last
    assert all(torch.isfinite(value).all() for value in together.targets.values())


def test_direct_forces_are_no_gradient_and_conservative_ones_stay_in_the_same_batch():
    mixed = model_of({}, {"forces": "direct", "stress": "direct"})
    atoms = rattled_molecule()
    both = mixed(batch_of([to_structure(atoms), to_structure(atoms)], [0, 1]))
    conservative, direct = both.forces[: len(atoms)], both.forces[len(atoms) :]
    assert (conservative.sum(0).abs() < 1e-10).all() and (direct.sum(0).abs() > 1e-6).any()


def test_from_direct_to_conservative_the_encoder_stays():
    """Fine-tuning copies encoder and energy head; forces are then the gradient of the same energy."""
    direct = model_of({"forces": "direct", "stress": "direct"})
    conservative = model_of({})
    own = conservative.state_dict().keys()
    conservative.load_state_dict({name: value for name, value in direct.state_dict().items() if name in own})
    atoms = rattled_molecule()
    torch.testing.assert_close(predict(conservative, atoms).energy, predict(direct, atoms).energy, rtol=0, atol=1e-12)
    assert not torch.allclose(predict(conservative, atoms).forces, predict(direct, atoms).forces, atol=1e-4)


def charged(charge: int, multiplicity: int | None = 1) -> Atoms:
    atoms = rattled_molecule()
    atoms.info.update(charge=charge, multiplicity=multiplicity)
    return atoms


def test_charge_and_spin_change_predictions_of_tasks_that_are_told_and_their_weights_learn():
    model = model_of({"charge_spin": True}, {"charge_spin": False})
    potential = Potential(model)
    states = [charged(0), charged(1, 2), charged(0, 3), charged(0, None)]
    told, blind = ([row["energy"] for row in potential.predict(states, tasks=[task])] for task in ("task0", "task1"))
    assert len({round(energy, 9) for energy in told}) == 4
    assert len({round(energy, 9) for energy in blind}) == 1
    model = model_of({"charge_spin": True}).train()
    structures = [to_structure(rattled_molecule(), charge=1, multiplicity=2)]
    out = model(batch_of(structures))
    (out.interaction.square().sum() + out.forces.square().sum()).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "charge_spin" in name}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert before and all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_tasks_may_be_told_apart_from_the_first_layer():
    atoms = [rattled_molecule()]
    batch = batch_of([to_structure(atoms[0])])
    for settings, tasks in (({"task_embedding": True}, [{}, {}]), ({}, [{"charge_spin": True}, {}])):
        model = model_of(*tasks, **settings)
        every = model.energies_of_all_tasks(batch)[0]
        for task in range(2):
            found = model(batch_of([to_structure(atoms[0])], [task])).energy[0]
            torch.testing.assert_close(found, every[task], rtol=0, atol=1e-9)


def test_heads_of_more_layers_have_their_parameters_and_serve_all_tasks_in_one_pass():
    model = model_of({}, {}, {}, head_layers=3)
    assert sum(p.numel() for p in model.energy_head.parameters()) == 3 * (16 * 8 + 8 + 2 * (8 * 8 + 8) + 8 + 1)
    batch = batch_of([to_structure(rattled_molecule())] * 3, tasks=[0, 1, 2])
    torch.testing.assert_close(model.energies_of_all_tasks(batch).diagonal(), model(batch).energy, rtol=0, atol=1e-10)


def test_repulsion_keeps_atoms_apart_and_ends_smoothly():
    plain, repelled = model_of({}), model_of({}, repulsion="zbl")

    def difference(distance: float, of: str = "OC"):
        pair = Atoms(of, positions=[[0, 0, 0], [distance, 0, 0]])
        return [float((predict(m, pair).interaction)[0]) for m in (repelled, plain)]

    def energy(distance: float) -> float:
        with_it, without = difference(distance)
        return with_it - without

    # Screened Coulomb energy of C and O at 0.2 Å, by hand: 14.3996 * 6 * 8 / 0.2 * phi(0.2 / 0.1515) * inside.
    length = 0.8854 * 0.529177 / (8**0.23 + 6**0.23)
    x = 0.2 / length
    phi = sum(
        a * np.exp(-b * x) for a, b in ((0.18175, 3.1998), (0.50986, 0.94229), (0.28022, 0.4029), (0.02817, 0.20162))
    )
    y = 0.2 / (0.76 + 0.66)
    expected = 14.399645 * 48 / 0.2 * phi * (1 - 28 * y**6 + 48 * y**7 - 21 * y**8)
    assert energy(0.2) == pytest.approx(expected, rel=1e-5)
    assert energy(0.1) > energy(0.3) > energy(0.8) > 0
    assert abs(energy(1.43)) < 1e-12 and abs(energy(1.4199)) < 1e-6


def test_an_ensemble_tells_how_sure_it_is_without_moving_the_encoder():
    model = model_of({}, ensemble=4).train()
    batch = batch_of([to_structure(rattled_molecule(), energy=-3000.0)])
    loss = LossSection(energy_weight=0.0, forces_weight=0.0, stress_weight=0.0, spread_weight=1.0)
    goal = make_objective(model, loss, [1.0])
    out = model(batch)
    assert out.spread[0] > 0
    goal.total(goal.sums(out, batch), goal.counts(batch)).backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved and all(name.startswith("energy_head") for name in moved)
    (row,) = Potential(model).predict([rattled_molecule()])
    assert row["energy_spread"] == pytest.approx(float(out.spread[0].detach()), rel=1e-6)


def test_missing_labels_are_masked_and_counted():
    model = model_of({"targets": {"charges": CHARGES, "gap": GAP}}, {}).train()
    batch = batch_of([to_structure(rattled_molecule()), to_structure(rattled_molecule("H2O"))], [0, 1])
    batch.target_charges = torch.zeros(len(batch.numbers), dtype=torch.float64)
    batch.target_charges_mask = torch.arange(len(batch.numbers)) < 4
    batch.target_gap = torch.tensor([1.0, float("nan")], dtype=torch.float64).nan_to_num()
    batch.target_gap_mask = torch.tensor([True, False])
    goal = make_objective(model, LossSection(target_weights={"gap": 3.0}), [1.0, 1.0])
    counts = goal.counts(batch)
    assert counts[:, goal.quantities.index("charges")].tolist() == [4, 0]
    assert counts[:, goal.quantities.index("gap")].tolist() == [1, 0]
    before = goal.sums(model(batch), batch)
    batch.target_gap[1] = 1e6  # a label that is masked
    batch.target_charges[5:] = -1e6
    torch.testing.assert_close(goal.sums(model(batch), batch), before, rtol=0, atol=0)
    goal.total(before, counts).backward()
    head = model.targets.heads["target_gap"].values.first.weight.grad
    assert head[0].abs().sum() > 0 and head[1].abs().sum() == 0


def test_labels_of_what_a_task_does_not_predict_are_left_aside():
    model = model_of({"forces": "none", "stress": "none"}, {}).train()
    forces = np.ones((9, 3))
    batch = batch_of([to_structure(rattled_molecule(), energy=-3000.0, forces=forces) for _ in range(2)], [0, 1])
    goal = make_objective(model, LossSection(), [1.0, 1.0])
    counts, sums = goal.counts(batch), goal.sums(model(batch), batch)
    column = goal.quantities.index("forces")
    assert counts[:, column].tolist() == [0, 27]
    assert sums[0, 3 * column : 3 * column + 3].tolist() == [0, 0, 0] and sums[1, 3 * column] > 0
    batch.forces[:9] = 1e6
    torch.testing.assert_close(goal.sums(model(batch), batch), sums, rtol=0, atol=0)


def test_files_keep_every_head_and_chosen_tasks_only_theirs(tmp_path):
    model = model_of(
        {"targets": ALL_TARGETS, "charge_spin": True},
        {"forces": "direct", "stress": "direct"},
        ensemble=3,
        head_layers=2,
        task_embedding=True,
        attention_targets=("gap",),
    )
    save_model(model, tmp_path / "m.safetensors", dtype="float64")
    loaded, atoms = load_model(tmp_path / "m.safetensors"), [charged(1, 2)]
    for ours, theirs in zip(Potential(model).predict(atoms), loaded.predict(atoms), strict=True):
        assert ours["energy"] == theirs["energy"] and ours["energy_spread"] == theirs["energy_spread"]
        assert ours["targets"].keys() == theirs["targets"].keys()
        assert all(np.array_equal(ours["targets"][name], theirs["targets"][name]) for name in ours["targets"])
    one = Potential(with_tasks(loaded.model, ["task1"]))
    (expected,) = loaded.predict(atoms, tasks=["task1"])
    (found,) = one.predict(atoms)
    assert found["energy"] == pytest.approx(expected["energy"], abs=1e-9)
    np.testing.assert_allclose(found["forces"], expected["forces"], atol=1e-10)
    assert not any(name.startswith("targets") for name in one.model.state_dict())


def test_the_calculator_gives_what_the_task_has():
    potential = Potential(model_of({"targets": {"charges": CHARGES, "gap": GAP}, "forces": "none", "stress": "none"}))
    atoms = rattled_molecule()
    atoms.calc = potential.calculator("task0")
    assert atoms.get_charges().shape == (len(atoms),)
    assert isinstance(atoms.calc.extras["gap"], float) and "gap" not in atoms.calc.results
    assert "forces" not in atoms.calc.implemented_properties


def test_the_calculator_sees_a_change_of_charge_and_spin():
    potential = Potential(model_of({"charge_spin": True, "multiplicity_known": True}))
    atoms = charged(0, 1)
    atoms.calc = potential.calculator("task0")
    neutral = atoms.get_potential_energy()
    atoms.info.update(charge=1, multiplicity=2)
    ionised = atoms.get_potential_energy()
    fresh = charged(1, 2)
    fresh.calc = potential.calculator("task0")
    assert ionised != neutral and ionised == fresh.get_potential_energy()


def test_a_multiplicity_that_training_always_knew_must_be_given():
    potential = Potential(model_of({"charge_spin": True, "multiplicity_known": True}))
    plain = rattled_molecule("OH")
    with pytest.raises(StructureError, match=r"structure 0 does not state its spin multiplicity .*, 2 or more"):
        potential.predict([plain])
    plain.info["multiplicity"] = 1.5
    with pytest.raises(StructureError, match=r"atoms.info\['multiplicity'\] is 1.5, not a whole number"):
        potential.predict([plain])


@pytest.mark.parametrize("encoder", ["painn", "mace"])
@pytest.mark.parametrize("kind", ["told", "repelled"])
def test_a_compiled_step_holds_every_head(kind, encoder, monkeypatch):
    """Traced and eager gradients of all losses agree; test_compiled.py compiles the traces."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    targets = {"gap": GAP, "charges": CHARGES, "dipoles": DIPOLES}
    if kind == "told":
        told, direct = {"targets": targets, "charge_spin": True}, {"forces": "direct", "stress": "direct"}
        settings = {"ensemble": 3, "task_embedding": True, "attention_targets": ("gap",)}
    else:
        told, direct, settings = {"targets": targets}, {}, {"repulsion": "zbl", "ensemble": 2, "head_layers": 2}
    model = model_of(told, direct, encoder=encoder, layers=1, **settings).train()
    generator, structures = torch.Generator().manual_seed(1), []
    for atoms, condition in ((rattled_molecule(), {"charge": 1, "multiplicity": 2}), (rattled_crystal(), {})):
        forces = torch.randn(len(atoms), 3, generator=generator, dtype=torch.float64).numpy()
        stress = 0.01 * np.eye(3) if atoms.pbc.all() else None
        structures.append(to_structure(atoms, energy=-1e3, forces=forces, stress=stress, **condition))
    batch = batch_of(structures, [0, 1], extra=(1, 3, 2))
    for name in targets:
        batch[f"target_{name}"] = torch.ones_like(model(batch).targets[name].detach())
        batch[f"target_{name}_mask"] = batch.atom_mask if name != "gap" else batch.structure_mask
    found = []
    for traced in (False, True):
        trained = ModelWithLoss(model, make_objective(model, LossSection(force_errors="norm"), [1.0, 0.5]))
        if traced:
            assert trained.compile_steps() is None
        model.zero_grad()
        trained(batch, trained.objective.counts(batch))[0].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("how", ["traced", pytest.param("compiled", marks=pytest.mark.compiler)])
def test_compiled_predictions_hold_every_head(how, monkeypatch):
    if how == "traced":
        monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    targets = {"gap": GAP, "charges": CHARGES, "dipoles": DIPOLES}
    told, direct = {"targets": targets, "charge_spin": True}, {"forces": "direct", "stress": "direct"}
    model = model_of(told, direct, ensemble=3, layers=1)
    structures = [to_structure(rattled_molecule(), charge=1, multiplicity=2), to_structure(rattled_crystal())]
    batch = batch_of(structures, [0, 1], extra=(1, 3, 2))
    expected = model(batch)
    assert use_kernels(model) is None
    found = CompiledModel(model)(batch)
    for name in ("interaction", "forces", "stress", "spread"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-10)
    for name, value in expected.targets.items():
        torch.testing.assert_close(found.targets[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        ({"has_energy": False}, {}, "has no energies"),
        ({"forces": "direct"}, {}, "mixes direct forces with conservative stress"),
        ({"forces": "direct", "stress": "direct"}, {"repulsion": "zbl"}, "does not affect"),
        ({}, {"encoder": "pain"}, "did you mean 'painn'"),
        ({"targets": {"gap": GAP}}, {"attention_targets": ("gpa",)}, "did you mean 'gap'"),
        ({"targets": {"charges": CHARGES}}, {"attention_targets": ("charges",)}, "not a mean over atoms"),
    ],
)
def test_heads_that_do_not_fit_are_refused(task, settings, words):
    with pytest.raises(ConfigError, match=words):
        model_of(task, **settings)


def test_tasks_must_agree_on_a_target():
    other = TargetFacts(of="atom", kind="scalar", unit="eV")
    with pytest.raises(ConfigError, match=r"'gap' is a scalar of the structure .* in task 'task0' and"):
        model_of({"targets": {"gap": GAP}}, {"targets": {"gap": other}})
