"""The real datasets of launch/convert, where they are at hand: counts, duplicates, energies to the last digit.

Set HYDRAZERO_DATA to their folder (default: ../shared/data beside the repository).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from ase.units import kcal, mol
from test_convert import all_structures

from hydrazero.shards.convert import convert
from hydrazero.shards.convert_settings import load_convert_settings

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("HYDRAZERO_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}: set HYDRAZERO_DATA"),
]


def converted(name: str, pattern: str, out: Path):
    settings = load_convert_settings(ROOT / "launch" / "convert" / f"{name}.toml")
    return convert(sorted(DATA.glob(pattern)), name, out / name, settings)


def test_ethanol_pbe(tmp_path):
    manifest = converted("ethanol_pbe", "ethanol_multifid/pbe_def2svp/*.xyz", tmp_path)
    assert manifest.structures() == 2300 and manifest.duplicate_count == 1000
    assert manifest.set_aside == {"not_selected": 548}


def test_3bpa(tmp_path):
    manifest = converted("3bpa", "3bpa_wb97x/train_*.xyz", tmp_path)
    assert manifest.structures() == 969 and manifest.duplicate_count == 31
    names = manifest.duplicates
    assert all(name.startswith("train_mixedT.xyz#") and " = train_300K.xyz#" in name for name in names)


def test_ethanol_ccsdt_keeps_every_digit_of_the_energies(tmp_path):
    manifest = converted("ethanol_ccsdt", "ethanol_multifid/ccsdt_ccpvtz/*.npz", tmp_path)
    assert manifest.structures() == 998 and manifest.duplicate_count == 2
    (path,) = DATA.glob("ethanol_multifid/ccsdt_ccpvtz/*.npz")
    with np.load(path) as archive:
        energies = archive["E"].reshape(-1) * (kcal / mol)
    for structures in all_structures(tmp_path / "ethanol_ccsdt").values():
        for structure in structures:
            assert structure.energy == energies[int(structure.source_id.rpartition("#")[2])]
