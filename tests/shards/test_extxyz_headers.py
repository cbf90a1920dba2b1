"""Comment lines of extended XYZ: cell, periodicity and columns are read in any case of letters, and never lost."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from click.testing import CliRunner

from hydrazero.launch.cli.main import main
from hydrazero.models.screening.sources import all_items, read_structure, sources_of
from hydrazero.shards.errors import StructureError
from hydrazero.shards.readers import ReadSettings, read_frames
from hydrazero.shards.readers.frames import Frame
from hydrazero.shards.structure import Structure

NINE = "4 0 0 1 5 0 0 0 6"
CELL = np.array([[4.0, 0, 0], [1, 5, 0], [0, 0, 6]])
GIVEN = f'Lattice="{NINE}"'
PERIODIC, SLAB, OPEN = (True, True, True), (True, True, False), (False, False, False)
ROWS = "Cu 0 0 0\nCu 1.8 1.8 0\n"


def frame_of(folder: Path, header: str, rows: str = ROWS, name: str | None = None) -> Frame:
    path = folder / "a.xyz"
    path.write_text(f"{len(rows.splitlines())}\n{header}\n{rows}", encoding="utf-8")
    (frame,) = read_frames(path, ReadSettings(format=name))
    return frame


def read(folder: Path, header: str, rows: str = ROWS) -> Structure:
    frame = frame_of(folder, header, rows)
    assert frame.structure is not None, frame.error
    return frame.structure


def refused(folder: Path, header: str, *words: str, rows: str = ROWS) -> None:
    frame = frame_of(folder, header, rows)
    assert frame.structure is None, (frame.structure.cell, frame.structure.pbc)
    assert all(word in str(frame.error) for word in words), str(frame.error)


@pytest.mark.parametrize("key", ["Lattice", "lattice", "LATTICE", "LatTice", '"Lattice"'])
@pytest.mark.parametrize("value", ['="{}"', "='{}'", "={{{}}}", "=[{}]", ' = "{}"', '= "{}"'])
def test_the_cell_in_any_spelling(tmp_path, key, value):
    structure = read(tmp_path, f"name=a {key}{value.format(NINE)} energy=-1.5 n=2")
    np.testing.assert_array_equal(structure.cell, CELL)
    assert tuple(structure.pbc) == PERIODIC and structure.energy == -1.5


def test_commas_and_brackets_in_the_cell(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, f'Lattice="{NINE.replace(" ", ",")}"').cell, CELL)
    nested = "lattice=[[4, 0, 0], [0, 5, 0], [0, 0, 6]] energy=-1"
    np.testing.assert_array_equal(read(tmp_path, nested).cell, np.diag([4.0, 5, 6]))
    refused(tmp_path, "Lattice=[[4,1,0],[0,5,0],[0,0,6]]", "rows or columns")


@pytest.mark.parametrize("key", ["pbc", "PBC", "Pbc"])
@pytest.mark.parametrize(
    "value",
    ['"T T F"', "[true,true,false]", "[True, True, False]", "TTF", '"1 1 0"', '"t t f"', "'T,T,F'", '["T","T","F"]'],
)
def test_the_periodicity_in_any_spelling(tmp_path, key, value):
    assert tuple(read(tmp_path, f"{GIVEN} {key}={value} energy=1").pbc) == SLAB


def test_one_flag_for_all_directions(tmp_path):
    assert tuple(read(tmp_path, f"{GIVEN} pbc=F").pbc) == OPEN
    assert tuple(read(tmp_path, f"{GIVEN} pbc=T").pbc) == PERIODIC
    assert tuple(read(tmp_path, 'pbc="F F F"').pbc) == OPEN


@pytest.mark.parametrize(
    ("header", "words"),
    [
        *(
            (f'{key}="{NINE}"', (f"'{key}'", "looks like Lattice", "Lattice="))
            for key in (
                "Latice",
                "Lattic",
                "latttice",
                "lattice_vectors",
                "cell",
                "Cell",
                "unit_cell",
                "Box",
                "dft_cell",
            )
        ),
        ("cell='4 5 6 90 90 90'", ("looks like Lattice",)),
        ("box=12.0", ("looks like Lattice",)),
        ("a=4 b=4 c=4 alpha=90 beta=90 gamma=90", ("looks like Lattice",)),
        ('vec1="4 0 0" vec2="0 4 0" vec3="0 0 4"', ("looks like Lattice",)),
        (f"Lattice: {NINE}", ("looks like Lattice",)),
        (f'Lattice "{NINE}"', ("looks like Lattice",)),
        (f"Lattice={NINE}", ("nine numbers",)),
        (f"Lattice=“{NINE}”", ("nine numbers",)),
        ('Lattice="4 5 6"', ("nine numbers", "4 5 6")),
        ('Lattice="4 0 0 0 4 0 0 0"', ("nine numbers",)),
        ('Lattice="4 0 0 0 4 0 0 0 four"', ("nine numbers",)),
        (f'{GIVEN} lattice="5 0 0 0 5 0 0 0 5"', ("Lattice twice",)),
        (f'{GIVEN} perodic="F F F"', ("has 'perodic=\"F F F\"', which looks like pbc",)),
        # A missing or displaced quotation mark swallows what follows.
        (f'name="a b {GIVEN}', ("other half",)),
        (f'name="a b {GIVEN} note="c d"', ("displaced",)),
        (f"charge= {GIVEN}", ("inside the text of 'charge'",)),
        (f'Lattice="{NINE} pbc="T T F"', ("other half",)),
        (f'Lattice="{NINE} pbc="T T F', ("nine numbers",)),
        (f'Lattice="{NINE}', ("after 'Lattice='", "other half")),
        (f'{GIVEN} note="a pbc="T T F"', ("other half",)),
        (f'{GIVEN} note="a pbc="T T F', ("'pbc='", "inside")),
        (f'{GIVEN} energy=-1 note="abc', ("after 'note='",)),
        (f"trust 'me energy=-1 {GIVEN}", ("other half",)),
        (f"name=a'{GIVEN}", ("'Lattice='", "inside")),
        (f'"{GIVEN}"', ("displaced",)),
        (f'note="a"{GIVEN}', ("'Lattice='", "inside")),
        (f"note=x{GIVEN}", ("'Lattice='", "inside")),
        (f'La tice="{NINE}"', ("looks like Lattice",)),
    ],
)
def test_no_cell_is_lost(tmp_path, header, words):
    refused(tmp_path, header, *words)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        *(
            (f"{key}={value}", (f"'{key}'", "looks like pbc"))
            for key, value in (
                ("pcb", '"T T F"'),
                ("pbcs", '"T T F"'),
                ("pb_c", '"T T F"'),
                ("pbc_x", "F"),
                ("periodic", "F"),
                ("Periodicity", '"T T F"'),
                ("boundary", '"p p f"'),
                ("bc", "ppf"),
            )
        ),
        ("pb='T T F'", ("looks like pbc",)),
        ('pbcT"T T F"', ("looks like pbc",)),
        ('pb c="T T F"', ("'c=\"T T F\"'", "looks like pbc", "state pbc as well")),
        ("relax=[True, True, False]", ("looks like pbc", "state pbc as well")),
        ("pbc=T T F", ("needs quotation marks",)),
        ('pbc=T T F"', ("without its other half",)),
        ('note=xpbc="T T F"', ("'pbc='", "inside the text of 'note'")),
        ('config_type="bulk"pbc="T T F"', ("inside the text of 'config_type'",)),
        ("pbc: T T F", ("looks like pbc",)),
        ("pbc T T F", ("looks like pbc",)),
        ('pbc="maybe yes no"', ("must be like", "maybe yes no")),
        ('pbc="T T"', ("must be like",)),
        ('pbc="2 1 0"', ("must be like",)),
        ("pbc=", ("must be like",)),
        ('pbc="T T T" PBC="F F F"', ("pbc twice",)),
        ("energy=-1.0 energy=-2.0", ("energy twice, as '-1.0' and as '-2.0'",)),
    ],
)
def test_no_periodicity_is_lost(tmp_path, entry, words):
    refused(tmp_path, f"{GIVEN} {entry}", *words)


def test_periodic_without_a_cell(tmp_path):
    refused(tmp_path, "water box, pbc, 300 K", "looks like pbc")
    refused(tmp_path, "periodic=True", "looks like pbc")
    refused(tmp_path, 'pbc="T T T"', "length zero")


@pytest.mark.parametrize(
    "header",
    [
        *("periodic=T", "boundary=grain", "cell_id=3", "lattice_type=fcc", "PBE=1", "pbe0=2", "box_name=a", "Pb=1"),
        *('relax="T T T"', 'pbc="T T T" relax="T T F"'),
        *("lattice=" + f'"{NINE}"', "pbc", 'comment=""', 'note="from Lattice=bcc"', '{"a": "b"}'),
        *("Don't trust", "author=O'Neill", "author=O'Neill other=d'Arc"),
    ],
)
def test_other_fields_beside_a_cell(tmp_path, header):
    structure = read(tmp_path, f"{header} {GIVEN} energy=-1")
    np.testing.assert_array_equal(structure.cell, CELL)
    assert tuple(structure.pbc) == PERIODIC and structure.energy == -1


@pytest.mark.parametrize(
    "header",
    [
        "",
        "=== 3 ===",
        "Don't know",
        "Lattice of copper",
        "lattice_type=fcc cell_id=3",
        "energy minimised",
        "5' end, 'a'",
    ],
)
def test_plain_comments_are_molecules_without_labels(tmp_path, header):
    structure = read(tmp_path, header)
    assert tuple(structure.pbc) == OPEN and not structure.cell.any() and structure.energy is None


FORCES = "Cu 0 0 0 1 2 3\nCu 1.8 1.8 0 4 5 6\n"


@pytest.mark.parametrize(
    "header",
    [
        "Properties=species:S:1:pos:R:3:forces:R:3",
        "properties=Species:S:1:POS:R:3:forces:R:3",
        'PROPERTIES="species:s:1:pos:r:3:forces:r:3"',
    ],
)
def test_columns_in_any_case(tmp_path, header):
    np.testing.assert_array_equal(read(tmp_path, f"{header} {GIVEN}", FORCES).forces, [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("Propertes=species:S:1:pos:R:3:forces:R:3", ("looks like Properties",)),
        ("columns=species:S:1:pos:R:3:forces:R:3", ("looks like Properties",)),
        ("Propertiesspecies:S:1:pos:R:3:forces:R:3", ("looks like Properties",)),
        ("Properties=species:S:1:pos:R:3", ("line of atom 0 has 7 words", "name 4 columns")),
        ("Properties=species:S:1:pos:R:3:tags:I:1:forces:R:3", ("has 7 words", "8 columns")),
        ("Properties=species:S:1:pos:R:3:forces:R", ("must be like",)),
        ("Properties=species:S:1:pos:Q:3:forces:R:3", ("must be like",)),
        ("Properties=species:S:1:forces:R:3:forces:R:3", ("twice",)),
        ("Properties=species:S:1:x:R:3:forces:R:3", ("lack",)),
        ('Properties="species:S:1:pos:R:3:forces:R:3 energy=-1', ("after 'Properties='",)),
        ('name="a Properties=species:S:1:pos:R:3', ("after 'name='",)),
    ],
)
def test_no_column_is_lost(tmp_path, header, words):
    refused(tmp_path, header, *words, rows=FORCES)


def test_what_ase_writes_is_read(tmp_path):
    info = {
        "energy": -1.0,
        "text": 'a "b" = c',
        "list": [1, 2],
        "flag": True,
        "nested": {"a": [1, "x"]},
        "n": 3,
        "uid": "7",
    }
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [1.8, 1.8, 0]], cell=CELL, pbc=SLAB, info=info)
    path = tmp_path / "a.extxyz"
    ase.io.write(path, [atoms, atoms])
    first, _ = read_frames(path, ReadSettings())
    np.testing.assert_array_equal(first.structure.cell, CELL)
    assert tuple(first.structure.pbc) == SLAB and first.structure.energy == -1
    expected = ase.io.read(path).info
    assert {key: first.info[key] for key in ("text", "flag", "nested", "n", "uid")} == {
        key: expected[key] for key in ("text", "flag", "nested", "n", "uid")
    }


def test_every_way_to_a_file_uses_one_parser(tmp_path):
    """The format 'ase', tar archives and screening lose no cell, either."""
    path = tmp_path / "a.xyz"
    text = f'2\nlattice="{NINE}" energy=-1\n{ROWS}2\nLatice="{NINE}" energy=-1\n{ROWS}'
    path.write_text(text)
    archive = tmp_path / "b.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("a.extxyz")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))
    for source, name in ((path, None), (path, "ase"), (archive, None)):
        good, bad = read_frames(source, ReadSettings(format=name))
        np.testing.assert_array_equal(good.structure.cell, CELL)
        assert bad.error.reason == "header"
    good, bad = all_items(sources_of([path]), lambda chunk: True)
    np.testing.assert_array_equal(read_structure(good).cell, CELL)
    with pytest.raises(StructureError, match="looks like Lattice"):
        read_structure(bad)


def test_a_bad_header_is_one_sentence_and_can_be_skipped(tmp_path):
    path = tmp_path / "a.xyz"
    good = f'2\nLattice="{NINE}" energy=-1 Properties=species:S:1:pos:R:3:forces:R:3\n{FORCES}'
    others = "".join(good.replace("1.8 1.8", f"1.8 {1.8 + 0.01 * n:.2f}") for n in range(30))
    path.write_text(others + good.replace("Lattice", "Latice"))
    options = ["convert", str(path), "--task", "t", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, options)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert result.exit_code == 1 and "a.xyz, frame 30: the comment line has 'Latice'" in line
    result = CliRunner().invoke(main, [*options, "--skip-bad"])
    assert result.exit_code == 0 and "header" in result.output
