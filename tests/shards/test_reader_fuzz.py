"""Files with any keys, shapes and types: each reader reads the frames, calls them bad, or ends in one sentence."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_files import FILES
from format_files import COLUMNS, TENSORS
from fuzzing import examples_for, few_examples
from hypothesis import strategies as st

from hydrazero.shards.errors import HydrazeroError, StructureError
from hydrazero.shards.readers import READERS, FieldNames, ReadSettings, SourceUnits, read_frames
from hydrazero.shards.targets import TargetSection

OUTPUTS = FieldNames(energy="outputs.energy", forces="outputs.forces", stress="outputs.virial_stress")
TARGETS = {
    "dipole": TargetSection(field="mu", kind="vector", unit="Debye", optional=True),
    "charges": TargetSection(field="q", of="atom", optional=True),
}
COLUMNS_OF = {
    "hdf5": {**COLUMNS, "ptr": "data/first"},
    "npz_columns": {key: name.replace("/", "|") for key, name in {**COLUMNS, "ptr": "data/first"}.items()},
    "lmdb": TENSORS,
}


def read_settings(case: str) -> st.SearchStrategy[ReadSettings]:
    chosen = [FieldNames(), FieldNames(charge="", stress=""), FieldNames(energy="total_energy", virial="virial")]
    return st.builds(
        ReadSettings,
        format=st.just(FILES[case][0]),
        fields=st.sampled_from([*chosen, *([OUTPUTS] if case == "pymatgen" else [])]),
        units=st.sampled_from([SourceUnits(), SourceUnits(energy="Hartree", forces="-Hartree/Bohr", stress="-kbar")]),
        columns=st.just(COLUMNS_OF.get(case, {})),
        require=st.sampled_from([(), ("energy", "forces"), ("stress", "charge")]),
        energy_per_atom=st.booleans(),
        targets=st.sampled_from([{}, TARGETS]),
        trust_pickle=st.just(True),
    )


def check_readable(case: str, content: Any, options: ReadSettings) -> None:
    """Read a file; nothing but a HydrazeroError of one line may be raised, by any number of frames."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = FILES[case][2](Path(name), content)
        errors: list[HydrazeroError] = []
        try:
            for frame in read_frames(path, options):
                assert (frame.structure is None) == (frame.error is not None)
                errors += [frame.error] if frame.error is not None else []
                assert frame.error is None or isinstance(frame.error, StructureError)
        except HydrazeroError as error:
            errors.append(error)
    for error in errors:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000, repr(error)


def cases_of(case: str) -> st.SearchStrategy[tuple[str, Any, ReadSettings]]:
    return st.tuples(st.just(case), FILES[case][1], read_settings(case))


@st.composite
def of_another_format(draw: st.DrawFn) -> tuple[str, Any, ReadSettings]:
    """Return a file of one format that is read as one of another."""
    case = draw(st.sampled_from(list(FILES)))
    settings = draw(read_settings(draw(st.sampled_from(list(FILES)))))
    return case, draw(FILES[case][1]), replace(settings, format=draw(st.sampled_from(READERS.names())))


CASES = {**{case: cases_of(case) for case in FILES}, "another format": of_another_format()}

FOUND: list[tuple[str, Any]] = [
    ("aselmdb", {"energy": -1.0, "spin": np.array([])}),
    ("aselmdb", {"energy": -1.0, "spin": [None, []]}),
    ("parquet", {"numbers": b"\x01\n", "positions": [[0.0, 0, 0]]}),
    ("alexandria", '{"entries": [{"structure": {"sites": true}}]}'),
]
"""Files that were once read with a traceback."""


def test_every_reader_is_fuzzed():
    assert {name for name, _, _ in FILES.values()} == {name for name in READERS.names() if not READERS.package_of(name)}


@pytest.mark.parametrize(("case", "content"), FOUND)
def test_files_that_have_failed(case, content):
    check_readable(case, content, ReadSettings(format=FILES[case][0], trust_pickle=True))


@pytest.mark.parametrize("case", CASES)
def test_a_few_faulty_files(case):
    few_examples(lambda example: check_readable(*example), CASES[case], 15)


@pytest.mark.fuzz
@pytest.mark.parametrize("case", CASES)
def test_faulty_files_for_minutes(case, fuzz_seconds):
    count = examples_for(lambda example: check_readable(*example), CASES[case], fuzz_seconds)
    print(f"{case}: {count:,} files")
    assert count
