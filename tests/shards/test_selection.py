"""[select]: numbers compare as numbers, texts as texts, and a key that no frame has is said to be missing."""

from __future__ import annotations

import numpy as np
import pytest
from sources import molecules, write_extxyz

from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.convert.splits import is_selected
from hydrazero.shards.errors import SourceError


@pytest.mark.parametrize(
    "value", [300, 300.0, "300", "300.0", b"300", np.float32(300), np.array([300.0]), np.int64(300)]
)
def test_numbers_compare_as_numbers(value):
    assert is_selected({"T": value}, {"T": [300]}) and is_selected({"T": value}, {"T": [100.0, 300.0]})
    assert not is_selected({"T": value}, {"T": [301]})


@pytest.mark.parametrize(
    ("value", "wanted", "selected"),
    [
        (np.float32(0.1), 0.1, True),
        ("MD", "MD", True),
        (b"MD", "MD", True),
        ("MD", "md", False),
        ("007", "7", False),  # texts, such as names
        (True, True, True),
        (np.True_, True, True),
        (True, 1, False),
        (2**53 + 1, 2**53, False),
        (None, "None", True),
        ([1, 2], 1, False),
        (float("nan"), 300, False),
    ],
)
def test_other_values(value, wanted, selected):
    assert is_selected({"key": value}, {"key": [wanted]}) == selected


def test_every_key_must_fit():
    select = {"T": [300], "kind": ["MD", "AIMD"]}
    assert is_selected({"T": 300.0, "kind": "AIMD"}, select)
    assert not is_selected({"T": 300.0, "kind": "scan"}, select) and not is_selected({"T": 300.0}, select)


def test_a_conversion_of_selected_frames(tmp_path):
    frames = molecules(8)
    for number, atoms in enumerate(frames):
        atoms.info["T"] = 300.0 if number % 2 else 600
    source = write_extxyz(tmp_path / "a.xyz", frames)
    manifest = convert([source], "t", tmp_path / "out", ConvertSettings(select={"T": [300]}))
    assert manifest.structures() == 4 and manifest.set_aside == {"not_selected": 4}
    with pytest.raises(SourceError, match=r"no frame has the field 'temperature' of \[select\]; the frames have T\."):
        convert([source], "t", tmp_path / "none", ConvertSettings(select={"T": [300], "temperature": [300]}))
