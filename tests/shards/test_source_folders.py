"""Folders and archives of sources: what is read, what is named as not read, and what is left out silently."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from format_files import COLUMNS, frames, pymatgen_entry, samples, waters, write_deepmd, write_hdf5
from sources import metals, molecules, write_extxyz

from hydrazero.models.screening.output import RECORD_NAME, SCREEN_KEY, SUMMARY_NAME
from hydrazero.models.screening.part_files import CHUNKS_KEY
from hydrazero.models.screening.sources import sources_of
from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers import ReadSettings, find_sources
from hydrazero.shards.readers.finding.folders import PREDICTIONS, RESULTS, SCREENED
from hydrazero.trainer.evaluation.evaluate import results_beside, results_in
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, RUN_NAME
from hydrazero.trainer.search.journal import JOURNAL_NAME, TRIALS

PASSED_OVER = "3 files of '{}' are in no known format and were not read: METHOD.md, a.foo, sub/b.bar."


def folder_of(tmp_path: Path) -> Path:
    """Return a folder 'data' with one source, three other files, hidden ones, and results of commands."""
    folder = tmp_path / "data"
    names = ("a.xyz", "sub/._a.xyz", "sub/.ipynb_checkpoints/a.xyz", "__MACOSX/a.xyz", ".old.part/frames/a.xyz")
    source = write_extxyz(tmp_path / "source.xyz", molecules(20))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    for name in ("METHOD.md", "a.foo", "sub/b.bar", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_text("no source")
    convert([source], "t", folder / "out", load_convert_settings(None))
    (folder / "out" / "more.xyz").write_bytes(source.read_bytes())
    return folder


def test_files_that_are_not_read_are_counted_and_named(tmp_path):
    folder = folder_of(tmp_path)
    found = find_sources([folder], ReadSettings())
    assert found.files == (folder / "a.xyz",)
    result = f"a result of earlier commands in '{folder}' was not read: out/."
    assert found.not_read == (PASSED_OVER.format(folder), result)
    manifest = convert([folder], "t", tmp_path / "shards", load_convert_settings(None))
    assert manifest.structures() == 20 and manifest.warnings[:2] == list(found.not_read)
    said: list[str] = []
    (source,) = sources_of([folder], say=said.append)
    assert source.path == folder / "a.xyz" and said == list(found.not_read)
    named = find_sources([folder], ReadSettings(format="extxyz")).not_read[0]
    assert named.startswith(f"3 files of '{folder}' are in another format than 'extxyz' and were not read: METHOD.md")


ABOUT = (
    "README",
    "readme.md",
    "LICENSE",
    "LICENCE.txt",
    "LICENSE-MIT",
    "LICENSE.source.txt",
    "COPYING",
    "CITATION.cff",
    "citation.bib",
)
CHECKSUMS = ("SHA256SUMS", "md5sum.txt", "checksums.txt", "a.xyz.sha256")


@pytest.mark.parametrize("name", [*ABOUT, *CHECKSUMS])
def test_files_about_the_data_are_passed_over_without_a_word(tmp_path, name):
    source = write_extxyz(tmp_path / "a.xyz", molecules(1))
    (tmp_path / name).write_text("about the data")
    found = find_sources([tmp_path], ReadSettings())
    assert found.files == (source,) and not found.not_read


@pytest.mark.parametrize("name", ["README.foo", "licensed.txt", "readme_energies.dat", "labels.txt"])
def test_other_files_are_named(tmp_path, name):
    write_extxyz(tmp_path / "a.xyz", molecules(1))
    (tmp_path / name).write_text("labels")
    (sentence,) = find_sources([tmp_path], ReadSettings()).not_read
    assert sentence.endswith(f"not read: {name}.")


def test_long_lists_are_shortened_and_names_cannot_write_on_terminals(tmp_path):
    write_extxyz(tmp_path / "a.xyz", molecules(1))
    for number in range(12):
        (tmp_path / f"{number:02d}\x1b[2J.txt").touch()
    (sentence,) = find_sources([tmp_path], ReadSettings()).not_read
    assert "12 files" in sentence and sentence.endswith("and 4 more.") and "\x1b" not in sentence


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    (tmp_path / ".hidden").mkdir()
    path = write_extxyz(tmp_path / ".hidden" / "a.xyz", molecules(1))
    assert find_sources([tmp_path / ".hidden"], ReadSettings()).files == (path,)


def test_a_folder_without_a_source_says_what_it_holds(tmp_path):
    (tmp_path / "a.foo").touch()
    with pytest.raises(SourceError, match=r"holds no file with the suffix .*; 1 file of .* was not read: a\.foo; name"):
        find_sources([tmp_path], ReadSettings())


def test_shards_are_no_source_of_a_conversion(tmp_path):
    folder = folder_of(tmp_path) / "out"
    with pytest.raises(SourceError, match="out is a folder of shards, which are the result of a conversion"):
        convert([folder], "t", tmp_path / "shards", load_convert_settings(None))


@pytest.mark.parametrize("names", RESULTS, ids="-".join)
def test_results_of_all_commands_are_left_out(tmp_path, names):
    source = write_extxyz(tmp_path / "a.xyz", molecules(1))
    for name in names:
        (tmp_path / "earlier").mkdir(exist_ok=True)
        (tmp_path / "earlier" / name).touch()
    shutil.copy(source, tmp_path / "earlier" / "b.xyz")
    found = find_sources([tmp_path], ReadSettings())
    assert found.files == (source,) and "earlier/" in found.not_read[0]


def test_tables_of_screens_and_evaluations_are_left_out(tmp_path):
    source = write_extxyz(tmp_path / "a.xyz", molecules(1))
    table = pa.table({"index": [0]})
    for name, key in (("s.parquet", SCREEN_KEY), ("part.parquet", CHUNKS_KEY)):
        pq.write_table(table.replace_schema_metadata({key: b"x"}), tmp_path / name)
    files = results_beside(tmp_path / "model.safetensors")
    files.predictions.mkdir()
    pq.write_table(table, files.predictions / "t.parquet")
    files.evaluation.write_text("{}")
    found = find_sources([tmp_path], ReadSettings())
    assert found.files == (source,)
    assert "model.predictions/, part.parquet, s.parquet." in found.not_read[1]


def test_the_names_of_results_are_those_that_the_commands_write():
    evaluation = results_in(Path("run"))
    written = {RECORD_NAME, SUMMARY_NAME, RUN_NAME, MODEL_FACTS_NAME, JOURNAL_NAME, TRIALS}
    assert {name for names in RESULTS for name in names} == {
        *written,
        evaluation.evaluation.name,
        evaluation.predictions.name,
    }
    assert results_beside(Path("m.safetensors")).predictions.name == f"m{PREDICTIONS}"
    assert SCREEN_KEY.startswith(SCREENED) and CHUNKS_KEY.startswith(SCREENED)


def write_tar(path: Path, *names: str) -> Path:
    content = write_extxyz(path.with_name("frames.xyz"), molecules(3)).read_bytes()
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = content if name.endswith("xyz") else b"1,frame0,0.5\n" * 3
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_members_of_archives_that_are_not_read_are_named(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", "x/a.extxyz", "x/a.txt", "x/._a.extxyz", "README", "METHOD", "x/b.cif", ".DS_Store"
    )
    (sentence,) = find_sources([path], ReadSettings()).not_read
    assert sentence == (
        f"2 files of '{path}' are in another format than extended XYZ and were not read: METHOD, x/b.cif."
    )
    assert [frame.source_id for frame in frames(path)] == [f"a.tar/x/a.extxyz#{n}" for n in range(3)]
    assert not find_sources([write_tar(tmp_path / "b.tar", "a.xyz", "a.txt")], ReadSettings()).not_read


def test_deepmd_folders_are_recognised(tmp_path):
    system = write_deepmd(tmp_path / "all" / "water", waters(4))
    write_extxyz(tmp_path / "all" / "a.xyz", molecules(1))
    found = find_sources([tmp_path / "all"], ReadSettings())
    assert found.files == (tmp_path / "all" / "a.xyz", system) and not found.not_read
    assert len(frames(system)) == 4 and find_sources([system], ReadSettings()).files == (system,)


@pytest.mark.parametrize("name", ["pymatgen", "n2p2", "ani1x", "groups"])
def test_formats_that_share_a_suffix_are_recognised_by_their_content(tmp_path, name):
    if name == "pymatgen":
        path = tmp_path / "a.json"
        path.write_text(json.dumps([pymatgen_entry(each) for each in samples()]))
        (tmp_path / "notes.json").write_text('{"author": "me"}')
        assert len(frames(path)) == 3
        found = find_sources([tmp_path], ReadSettings())
        assert found.files == (path,) and found.not_read[0].endswith("not read: notes.json.")
    elif name == "n2p2":
        path = tmp_path / "input.data"
        path.write_text("begin\natom 0 0 0 Cu 0 0 0 0 0 0\nenergy -1\ncharge 0\nend\n")
        assert len(frames(path)) == 1
    else:
        h5py = pytest.importorskip("h5py")
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            group = file.create_group("H2O")
            numbers = "atomic_numbers" if name == "ani1x" else "numbers"
            positions = "coordinates" if name == "ani1x" else "positions"
            group[numbers] = [8, 1, 1]
            group[positions] = [[[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]]]
            group["wb97x_dz.energy" if name == "ani1x" else "energy"] = [-76.0]
        if name == "groups":
            assert frames(path)[0].structure.energy == -76.0
        else:
            with pytest.raises(SourceError, match=r"as ANI-1x has; convert it with --preset ani1x, which knows units"):
                frames(path)


def test_hdf5_of_ragged_arrays_is_still_read_as_such(tmp_path):
    atoms: list[Atoms] = [*samples(), *metals(2)]
    path = write_hdf5(tmp_path / "a.h5", atoms)
    assert len(frames(path, columns={**COLUMNS, "ptr": "data/first"})) == 5
