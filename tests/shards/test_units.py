"""Units: the spellings that are known, their values, and that no unit of another size is ever suggested."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms

from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import ConfigError, SourceError, did_you_mean
from hydrazero.shards.readers import read_frames
from hydrazero.shards.units import energy_factor, force_factor, length_factor, stress_factor, target_unit

# CODATA 2014, as in ASE.
HARTREE, BOHR = 27.211386024367243, 0.5291772105638411
KCAL, KJ = 0.04336410390059322, 0.010364269574711572
GPA = 1e9 * 1e-30 / 1.6021766208e-19

ENERGIES = {
    **dict.fromkeys(("eV", "ev", "EV"), 1.0),
    "meV": 1e-3,
    **dict.fromkeys(("Hartree", "hartree", "HARTREE", "Ha", "ha", "Eh", "E_h", "au", "a.u."), HARTREE),
    **dict.fromkeys(("mHartree", "mHa", "mEh"), 1e-3 * HARTREE),
    **dict.fromkeys(("Ry", "ry", "Rydberg"), HARTREE / 2),
    **dict.fromkeys(("kcal/mol", "Kcal/Mol", "kcal mol^-1", "kcal·mol⁻¹", "kcal/mole"), KCAL),
    **dict.fromkeys(("kJ/mol", "KJ/mol", "kj mol-1"), KJ),
}
LENGTHS = {
    **dict.fromkeys(("Å", "\u212b", "A\u030a", "A", "Ang", "ang", "angstrom", "Angstrom", "Angstroms"), 1.0),
    **dict.fromkeys(("Bohr", "bohr", "a0", "au", "a.u."), BOHR),
    "nm": 10.0,
    "pm": 0.01,
}
FORCES = {
    **dict.fromkeys(("eV/Ang", "eV/A", "eV/Å", "eV/angstrom", "eV Å^-1", "ev/Angstrom", "electronvolt/Ang"), 1.0),
    **dict.fromkeys(("Hartree/Bohr", "Ha/bohr", "Eh/a0", "au", "a.u."), HARTREE / BOHR),
    **dict.fromkeys(("-Hartree/Bohr", "- Ha/bohr", "\u2212au"), -HARTREE / BOHR),
    **dict.fromkeys(("kcal/mol/Ang", "kcal/(mol*Å)", "kcal/(mol Å)", "kcal mol^-1 A^-1"), KCAL),
    **dict.fromkeys(("kJ/mol/nm", "kJ mol-1 nm-1"), KJ / 10),
    "-eV/Å": -1.0,
    "mHa/Bohr": 1e-3 * HARTREE / BOHR,
}
STRESSES = {
    **dict.fromkeys(("eV/Å^3", "eV/A^3", "eV/A3", "eV/Å³", "eV/Ang**3"), 1.0),
    "-eV/Angstrom^3": -1.0,
    **dict.fromkeys(("GPa", "gpa"), GPA),
    "MPa": 1e-3 * GPA,
    "kPa": 1e-6 * GPA,
    "Pa": 1e-9 * GPA,
    **dict.fromkeys(("kbar", "Kbar", "KBAR", "kB"), 0.1 * GPA),
    "-kbar": -0.1 * GPA,
    "bar": 1e-4 * GPA,
    "mbar": 1e-7 * GPA,
    "Mbar": 100 * GPA,
    "Hartree/Bohr^3": HARTREE / BOHR**3,
    "Ry/bohr^3": HARTREE / 2 / BOHR**3,
    "au": HARTREE / BOHR**3,
}


@pytest.mark.parametrize(
    ("factor", "known"),
    [(energy_factor, ENERGIES), (length_factor, LENGTHS), (force_factor, FORCES), (stress_factor, STRESSES)],
)
def test_known_spellings(factor, known):
    assert {unit: factor(unit) for unit in known} == pytest.approx(known, rel=1e-9)


def test_units_of_targets():
    assert target_unit("") == (1.0, "")
    assert target_unit("Ha")[1] == "eV" and target_unit("Ha")[0] == pytest.approx(HARTREE)
    for unit in ("e*Angstrom", "e Å", "eA", "eÅ"):
        assert target_unit(unit) == (1.0, "eÅ")
    for unit in ("Bohr^3", "a0^3", "a0 a0 a0", "bohr**3"):
        assert target_unit(unit) == (pytest.approx(BOHR**3), "Å³")
    assert target_unit("Debye")[0] == target_unit("D")[0] == pytest.approx(0.2081943, rel=1e-6)
    for unit in ("muB", "µB", "\u03bcB", "mu_B"):
        assert target_unit(unit) == (1.0, "µB")
    for unit in ("au", "Bohr", "GPa", "eV/Å", "deg"):
        with pytest.raises(SourceError, match=r"of a target is not known \(known: eV"):
            target_unit(unit)


UNKNOWN = {
    energy_factor: ("MeV", "mev", "MEV", "MHa", "MHartree", "kHartree", "kcal", "kJ", "eV/Å", "-eV", "GPa", "", "(eV)"),
    length_factor: ("m", "a", "PM", "-Bohr", "mm", "eV", "Å^2"),
    force_factor: ("eV", "eV/Mile", "eV*Å", "kcal/Å", "eV/Å^2", "MeV/Å", "eV//Å"),
    stress_factor: ("mPa", "mpa", "MBAR", "eV/Å", "Gbar", "kN", "eV/Bohr^2"),
}


@pytest.mark.parametrize(("factor", "unit"), [(factor, unit) for factor in UNKNOWN for unit in UNKNOWN[factor]])
def test_an_unknown_unit_is_never_taken_for_one_of_another_size(factor, unit):
    with pytest.raises(SourceError) as caught:
        factor(unit)
    assert "did you mean" not in str(caught.value) and "is not known (known: " in str(caught.value)


@pytest.mark.parametrize(
    ("factor", "unit", "right"),
    [
        (energy_factor, "Hartee", "Hartree"),
        (length_factor, "angstrm", "Angstrom"),
        (force_factor, "Hartree/Bhor", "Hartree/Bohr"),
        (stress_factor, "-eV/Angstrm^3", "eV/Angstrom^3"),
    ],
)
def test_a_misspelt_long_name_is_recognised(factor, unit, right):
    with pytest.raises(SourceError, match="did you mean") as caught:
        factor(unit)
    assert f"'{right}'" in str(caught.value).replace("'-", "'")


def test_energies_per_atom_are_a_setting():
    with pytest.raises(SourceError, match=r"'eV/atom' is not known; .* set energy_per_atom = true"):
        energy_factor("eV/atom")


def test_names_that_differ_by_a_number_are_no_misspellings():
    assert did_you_mean("float16", ["float32", "float64"]) == " (known: float32, float64)"
    assert "fp64" in did_you_mean("fp46", ["fp16", "fp64"])
    assert did_you_mean("x", [f"name{n:02}" for n in range(25)]).endswith("name19 and 5 more)")


def test_gradients_and_spellings_in_a_conversion_file(tmp_path):
    from sources import write_extxyz

    atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 2]], info={"energy": -1.0})
    atoms.arrays["gradient"] = np.array([[0, 0, 0.1], [0, 0, -0.1]])
    source = write_extxyz(tmp_path / "a.xyz", [atoms])
    settings = tmp_path / "s.toml"
    settings.write_text(
        '[fields]\nforces = "gradient"\n[units]\nlength = "bohr"\nenergy = "Ha"\nforces = "-Hartree/Bohr"\n'
    )
    (frame,) = read_frames(source, load_convert_settings(settings).read_settings())
    np.testing.assert_allclose(frame.structure.positions[1, 2], 2 * BOHR)
    np.testing.assert_allclose(frame.structure.forces[0], [0, 0, -0.1 * HARTREE / BOHR])
    assert frame.structure.energy == pytest.approx(-HARTREE)
    settings.write_text('[units]\nstress = "mPa"\n')
    with pytest.raises(ConfigError, match="stress unit 'mPa' is not known"):
        load_convert_settings(settings)
