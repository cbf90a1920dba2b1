"""Labels of frames: orders of stresses, NaN, missing labels, charges, multiplicities, and partly occupied sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from click.testing import CliRunner
from format_files import frames, reasons, structures

from hydrazero.launch.cli.main import main
from hydrazero.models.inference.ase_structure import structure_from_atoms
from hydrazero.models.screening.prototypes import GeneratedSource
from hydrazero.models.screening.sources import all_items, read_structure, sources_of
from hydrazero.shards.errors import ConfigError, StructureError
from hydrazero.shards.readers import FieldNames, SourceUnits
from hydrazero.shards.targets import TargetSection

VASP = "xx yy zz xy yz xz"
SHEARED = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])
"""xx yy zz yz xz xy = 1 2 3 4 5 6."""
NINE, SIX = "1 6 5 6 2 4 5 4 3", "1 2 3 6 4 5"
"""The numbers of this matrix, and six of them in VASP's order."""


def one_atom(folder: Path, header: str, name: str = "a.xyz") -> Path:
    path = folder / name
    path.write_text(f'1\nLattice="2 0 0 0 2 0 0 0 2" {header}\nCu 0 0 0\n')
    return path


# Stress


@pytest.mark.parametrize("order", ["xx yy zz yz xz xy", VASP, "zz yy xx xy xz yz"])
def test_nine_numbers_have_no_order(tmp_path, order):
    path = one_atom(tmp_path, f'stress="{NINE}"')
    for name in (None, "ase"):
        np.testing.assert_array_equal(structures(path, name, stress_order=order)[0].stress, SHEARED)
    path = one_atom(tmp_path, f'virial="{NINE}"')
    (virial,) = structures(path, stress_order=order, fields=FieldNames(virial="virial"))
    np.testing.assert_allclose(virial.stress, -SHEARED / 8)


def test_six_numbers_of_a_file_are_in_its_order(tmp_path):
    path = one_atom(tmp_path, f'stress="{SIX}" virial="{SIX}"')
    for name in (None, "ase"):
        np.testing.assert_array_equal(structures(path, name, stress_order=VASP)[0].stress, SHEARED)
    (virial,) = structures(path, stress_order=VASP, fields=FieldNames(virial="virial"))
    np.testing.assert_allclose(virial.stress, -SHEARED / 8)
    path = one_atom(tmp_path, 'stress="1 2 3 4 5 6"')
    np.testing.assert_array_equal(structures(path)[0].stress, SHEARED)
    assert reasons(frames(one_atom(tmp_path, 'stress="1 2 3 4 5"'))) == ["stress_shape"]


def test_results_of_calculators_are_in_the_order_of_ase(tmp_path):
    atoms = Atoms("Cu", cell=[2, 2, 2], pbc=True)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, stress=np.array([1.0, 2, 3, 4, 5, 6]))
    ase.io.write(tmp_path / "a.traj", atoms)
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(atoms, data={"sigma": [1.0, 2, 3, 6, 4, 5]})
    ase.io.write(tmp_path / "a.json", atoms)
    for name, kind in (("a.traj", None), ("a.db", None), ("a.json", "ase")):
        for order in (VASP, "xx yy zz yz xz xy"):
            np.testing.assert_array_equal(structures(tmp_path / name, kind, stress_order=order)[0].stress, SHEARED)
    (own,) = structures(tmp_path / "a.db", stress_order=VASP, fields=FieldNames(stress="sigma"))
    np.testing.assert_array_equal(own.stress, SHEARED)


# NaN


def test_nan_is_no_label(tmp_path):
    path = tmp_path / "a.xyz"
    frame = 'Lattice="2 0 0 0 2 0 0 0 2" Properties=species:S:1:pos:R:3:forces:R:3'
    six, nine = " ".join(["nan"] * 6), " ".join(["nan"] * 9)
    path.write_text(
        f'1\n{frame} energy=nan charge=nan stress="{nine}" gap=nan\nCu 0 0 0 1 2 3\n'
        f'1\n{frame} energy=-1 stress="{six}" virial="{nine}"\nCu 0 0 0 nan nan nan\n'
    )
    gap = {"gap": TargetSection(field="gap", unit="eV")}
    first, second = structures(path, fields=FieldNames(virial="virial"), targets=gap)
    assert first.energy is None and first.stress is None and first.charge == 0 and first.targets == {}
    assert second.energy == -1 and second.stress is None and second.forces is None
    np.testing.assert_array_equal(first.forces, [[1, 2, 3]])
    found = frames(path, require=("energy", "forces"))
    assert reasons(found) == ["no_energy", "no_forces"]
    assert str(found[0].error) == "the frame has no energy (field 'energy'), since the numbers there are NaN"
    assert reasons(frames(path, require=("charge",))) == ["no_charge", "no_charge"]


@pytest.mark.parametrize(
    ("header", "row", "reason"),
    [
        ("energy=inf", "0 0 0", "non_finite_energy"),
        ("energy=-1", "0 nan 0", "non_finite_forces"),
        ('energy=-1 stress="1 nan 3 4 5 6"', "0 0 0", "non_finite_stress"),
        ("energy=true", "0 0 0", "energy_shape"),
    ],
)
def test_labels_that_are_known_in_part_or_infinite_are_faults(tmp_path, header, row, reason):
    path = tmp_path / "a.xyz"
    cell = 'Lattice="2 0 0 0 2 0 0 0 2"'
    path.write_text(f"1\n{cell} Properties=species:S:1:pos:R:3:forces:R:3 {header}\nCu 0 0 0 {row}\n")
    assert reasons(frames(path)) == [reason]


def test_words_of_a_comment_are_no_labels(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text("1\nenergy minimised, charge and stress unknown\nCu 0 0 0\n")
    (structure,) = structures(path)
    assert (structure.energy, structure.stress, structure.charge) == (None, None, 0)


# Missing labels


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("REF_energy=-1 T=300", ("'REF_energy', 'T'", '[fields] energy = "REF_energy"', "--config")),
        ("dft_energy=-1 kinetic_energy=1", ('[fields] energy = "dft_energy"', "'kinetic_energy'")),
        ("kinetic_energy=1 step=3", ('[fields] energy = "..."', "'kinetic_energy'")),
        ("formation_energy=1", ('[fields] energy = "..."', "'formation_energy'")),
        ("free_energy=-1 step=3", ('[fields] energy = "free_energy"',)),
        ("energy_wb97x=-1", ('[fields] energy = "energy_wb97x"',)),
        ("E=-1 n=3", ('[fields] energy = "E"',)),
        ("Energy=-1", ('[fields] energy = "Energy"',)),
        ("step=3", ("'step'", '[fields] energy = "..."')),
        ("name=a", (", and no other field could be it",)),
        ("", ("the frame has no energy (field 'energy')",)),
    ],
)
def test_the_fields_that_could_be_the_energy_are_listed(tmp_path, header, words):
    path = tmp_path / "a.xyz"
    path.write_text(f"1\n{header}\nCu 0 0 0\n")
    (frame,) = frames(path, require=("energy",))
    assert frame.error.reason == "no_energy" and all(word in str(frame.error) for word in words), str(frame.error)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("REF_forces", ("'REF_forces'", '[fields] forces = "REF_forces"', "leave 'forces' out of [labels] require")),
        ("force", ('[fields] forces = "force"',)),
        ("gradient", ('[fields] forces = "gradient"', "with a minus sign in the unit of forces")),
        ("momenta", ("'momenta'", '[fields] forces = "..."')),
    ],
)
def test_the_arrays_that_could_be_the_forces_are_listed(tmp_path, column, words):
    path = tmp_path / "a.xyz"
    path.write_text(f"1\nProperties=species:S:1:pos:R:3:{column}:R:3 energy=-1\nCu 0 0 0 1 2 3\n")
    (frame,) = frames(path, require=("energy", "forces"))
    assert frame.error.reason == "no_forces" and all(word in str(frame.error) for word in words), str(frame.error)


def test_missing_stresses_charges_and_targets(tmp_path):
    path = one_atom(tmp_path, f'energy=-1 REF_stress="{SIX}" q=1 spin=2 x=0.5')

    def message(label: str, **more: Any) -> str:
        return str(frames(path, require=(label,), **more)[0].error)

    assert '[fields] stress = "REF_stress"' in message("stress")
    assert '[fields] charge = "q"' in message("charge") and "'x'" not in message("charge")
    assert '[fields] multiplicity = "spin"' in message("multiplicity")
    assert "no gap (field 'bandgap')" in message("gap", targets={"gap": TargetSection(field="bandgap")})


def test_isolated_atoms_without_forces_say_what_to_do(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text("1\nenergy=-1\nCu 0 0 0\n")
    result = CliRunner().invoke(main, ["convert", str(path), "--task", "t", "--out", str(tmp_path / "out")])
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert "frame 0: the frame has no forces (field 'forces')" in line
    assert "leave 'forces' out of [labels] require" in line and "--skip-bad" in line


# Charge and multiplicity


@pytest.mark.parametrize(
    ("given", "charge"), [("-1e-10", 0), ("-0.9999999987", -1), ("2.0000009", 2), ("-3", -3), ("1.0", 1)]
)
def test_charges_are_whole_within_rounding(tmp_path, given, charge):
    assert structures(one_atom(tmp_path, f"charge={given}"))[0].charge == charge
    if charge > 0:
        assert structures(one_atom(tmp_path, f"multiplicity={given}"))[0].multiplicity == charge


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("charge=0.99999", "bad_charge"),
        ("charge=1e6", "bad_charge"),
        ("charge=inf", "bad_charge"),
        ("multiplicity=0", "bad_multiplicity"),
        ("multiplicity=-1", "bad_multiplicity"),
        ("multiplicity=1.5", "bad_multiplicity"),
        ("multiplicity=1e-9", "bad_multiplicity"),
    ],
)
def test_charges_and_multiplicities_that_cannot_be(tmp_path, header, reason):
    assert reasons(frames(one_atom(tmp_path, header))) == [reason]


# Occupancies


CIF = """data_salt
_cell_length_a 5.6
_cell_length_b 5.6
_cell_length_c 5.6
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_space_group_name_H-M_alt 'P 1'
loop_
_space_group_symop_operation_xyz
'x, y, z'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
"""
SITES = {
    "shared": ("Na1 Na 0 0 0 0.6", "Li1 Li 0 0 0 0.4", "Cl1 Cl 0.5 0.5 0.5 1.0"),
    "partly empty": ("Na1 Na 0 0 0 1.0", "Cl1 Cl 0.5 0.5 0.5 0.5"),
    "split": ("Na1 Na 0 0 0 1.0", "Cl1 Cl 0.5 0.5 0.45 0.5", "Cl2 Cl 0.5 0.5 0.55 0.5"),
    "uncertain": ("Na1 Na 0 0 0 1.0", "Cl1 Cl 0.5 0.5 0.5 0.85(2)"),
    "empty": ("Na1 Na 0 0 0 0.0", "Cl1 Cl 0.5 0.5 0.5 1.0"),
}


def cif(path: Path, *sites: str) -> Path:
    path.write_text(CIF + "\n".join(sites) + "\n")
    return path


@pytest.mark.parametrize("kind", SITES)
def test_disordered_crystals_are_bad_frames(tmp_path, kind):
    path = cif(tmp_path / "a.cif", *SITES[kind])
    (frame,) = frames(path)
    assert frame.error.reason == "disordered" and "shared by several elements or partly empty" in str(frame.error)
    (item,) = all_items(sources_of([path]), lambda chunk: True)
    with pytest.raises(StructureError, match="shared by several elements or partly empty"):
        read_structure(item)


def test_ordered_crystals_with_occupancies_are_read(tmp_path):
    (structure,) = structures(cif(tmp_path / "a.cif", "Na1 Na 0 0 0 1.0", "Cl1 Cl 0.5 0.5 0.5 1"))
    assert structure.numbers.tolist() == [11, 17]


def test_occupancies_of_other_formats(tmp_path):
    line = "ATOM      1  CA  ALA A   1    {:8.3f}{:8.3f}{:8.3f}{:6.2f}  0.00           C  \n"
    path = tmp_path / "a.pdb"
    for occupancy, expected in ((1.0, ""), (0.0, ""), (0.5, "disordered")):
        path.write_text("".join(line.format(x, 0.0, 0.0, occupancy) for x in (0.0, 1.5)) + "END\n")
        assert reasons(frames(path)) == [expected]
    disordered = ase.io.read(cif(tmp_path / "a.cif", *SITES["shared"]))
    ase.io.write(tmp_path / "a.traj", disordered)
    ase.io.write(tmp_path / "a.extxyz", disordered)
    assert reasons(frames(tmp_path / "a.traj")) == reasons(frames(tmp_path / "a.extxyz")) == ["disordered"]


def test_disordered_crystals_are_not_predicted_or_substituted(tmp_path):
    disordered = ase.io.read(cif(tmp_path / "a.cif", *SITES["shared"]))
    with pytest.raises(StructureError, match="shared by several elements"):
        structure_from_atoms(disordered)
    del disordered.info["occupancy"]
    assert len(structure_from_atoms(disordered)) == 2
    spec = tmp_path / "spec.toml"
    spec.write_text('[[prototypes]]\nname = "p"\nfile = "a.cif"\nsites = {Na = ["Na", "K"]}\n')
    with pytest.raises(ConfigError, match=r"prototype 'p' cannot be built .*shared by several elements"):
        GeneratedSource(spec)
    (tmp_path / "b.xyz").write_text('1\nlattice="4 0 0 0 4 0 0 0 4"\nNa 0 0 0\n')
    spec.write_text(spec.read_text().replace("a.cif", "b.xyz"))
    first, second = all_items([GeneratedSource(spec)], lambda chunk: True)
    assert read_structure(first).pbc.all() and read_structure(second).numbers.tolist() == [19]


def test_gradients_become_forces(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text("1\nProperties=species:S:1:pos:R:3:gradient:R:3 energy=-1\nCu 0 0 0 1 2 3\n")
    fields, units = FieldNames(forces="gradient"), SourceUnits(forces="-eV/Ang")
    np.testing.assert_array_equal(structures(path, fields=fields, units=units)[0].forces, [[-1, -2, -3]])
