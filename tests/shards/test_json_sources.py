"""JSON as Python and people write it: NaN, JSON lines, byte order marks, deep nesting."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import ijson
import pytest
from format_files import BOTH, OUTPUTS, alike, frames, jarvis_entry, pymatgen_entry, reasons, samples, structures

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers import FieldNames
from hydrazero.shards.readers.parts import json_stream
from hydrazero.shards.readers.parts.json_stream import JsonText

NOT_A_NUMBER = float("nan")
PATH = Path("a.json")


def entries() -> list:
    return [pymatgen_entry(a, note='say "NaN" [', extra=NOT_A_NUMBER) for a in samples()]


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
@pytest.mark.parametrize("text", [r"", r"\"", r"NaN", r"\\", r"[{", r"}]]", 'é NaN, [NaN] \\\\\\" NaN'])
def test_tokens_are_replaced_outside_of_texts_alone(monkeypatch, size, text):
    monkeypatch.setattr(json_stream, "CHUNK", size)
    data = [{"a": NOT_A_NUMBER, text: [NOT_A_NUMBER, 1.5, text]}, float("-inf"), text, {"nan": "Infinity"}]
    file = JsonText(io.BytesIO(b"\xef\xbb\xbf" + json.dumps(data, ensure_ascii=False).encode()), PATH)
    wanted = [{"a": None, text: [None, 1.5, text]}, "inf", text, {"nan": "Infinity"}]
    assert list(ijson.items(file, "item", use_float=True)) == wanted


def test_nan_in_a_list_of_entries(tmp_path):
    mixed = entries()
    mixed[0]["outputs"]["energy"] = mixed[1]["outputs"]["forces"][0][0] = NOT_A_NUMBER
    mixed[2]["outputs"]["virial_stress"] = NOT_A_NUMBER
    path = tmp_path / "a.json"
    path.write_text(json.dumps(mixed))
    found = frames(path, "pymatgen", fields=OUTPUTS)
    assert reasons(found) == ["", "non_finite_forces", ""]
    assert found[0].structure.energy is None and found[2].structure.stress is None
    assert found[2].structure.energy == samples()[2].calc.results["energy"]
    assert reasons(frames(path, "pymatgen", fields=OUTPUTS, require=BOTH))[0] == "no_energy"
    path.write_text(json.dumps(mixed).replace("NaN", "Infinity"))
    assert reasons(frames(path, "pymatgen", fields=OUTPUTS))[:2] == ["non_finite_energy", "non_finite_forces"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    lines = [json.dumps(entry) for entry in entries()]
    text = "\n".join([lines[0], "", lines[1], '{"structure": ', lines[2]])  # no newline at the end
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else b"\xef\xbb\xbf" + text.encode())
    found = frames(path, "pymatgen", fields=OUTPUTS, require=BOTH)
    assert reasons(found) == ["", "", "unreadable", ""] and "line 4 is not JSON" in str(found[2].error)
    alike([frame.structure for frame in found if frame.structure is not None], samples(), rtol=1e-12, atol=1e-12)


def test_json_lines_of_collections(tmp_path):
    made = [{"structure": entry["structure"], **entry["outputs"]} for entry in entries()]
    path = tmp_path / "a.jsonl"
    fields = FieldNames(stress="")
    path.write_text("\n".join(json.dumps(entry) for entry in made))
    for kind in ("mptrj", "alexandria"):
        alike(structures(path, kind, fields=fields), samples(), rtol=1e-12, atol=1e-12)
    path.write_text("\n".join(json.dumps({f"mp-{n}": {"0": entry}}) for n, entry in enumerate(made)))
    read = frames(path, "mptrj", fields=fields)
    assert [frame.info["material_id"] for frame in read] == ["mp-0", "mp-1", "mp-2"]
    path.write_text("\n".join(json.dumps({f"agm{n}": [{"steps": [entry]}]}) for n, entry in enumerate(made)))
    assert [f.source_id for f in frames(path, "alexandria", fields=fields)][2] == "a.jsonl#agm2/0/0"


@pytest.mark.parametrize("kind", ["pymatgen", "jarvis", "mptrj", "alexandria"])
def test_json_that_is_nested_too_deeply(tmp_path, kind):
    path = tmp_path / "a.json"
    for text in ("[" * 100_000, '{"a":' * 100_000, '[{"structure": ' + "[" * 100_000):
        path.write_text(text)
        with pytest.raises(SourceError, match=r"nests more than 200 lists and objects"):
            frames(path, kind)
    path = tmp_path / "a.jsonl"
    path.write_text('{"structure": ' + "[" * 100_000)
    assert reasons(frames(path, kind)) == ["unreadable"]


def test_a_line_that_does_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"structure": "' + "x" * 2000)
    with pytest.raises(SourceError, match=r"line 1, is longer than 1,000 bytes"):
        frames(path, "pymatgen")


def test_texts_are_no_true_flags(tmp_path):
    crystal = samples()[2]
    made = [jarvis_entry(crystal, cartesian=False) for _ in range(3)]
    made[1]["atoms"]["cartesian"], made[2]["atoms"]["cartesian"] = "False", "maybe"
    path = tmp_path / "a.json"
    path.write_text(json.dumps(made))
    found = frames(path, "jarvis")
    assert reasons(found) == ["", "", "unreadable"] and "'cartesian' is 'maybe'" in str(found[2].error)
    for frame in found[:2]:
        assert frame.structure.positions == pytest.approx(crystal.positions)


def test_charges_of_structures_that_the_settings_leave_out(tmp_path):
    made = entries()
    for entry in made:
        entry["structure"] |= {"charge": -1, "spin_multiplicity": 2}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(made))
    assert [(s.charge, s.multiplicity) for s in structures(path, "pymatgen", fields=OUTPUTS)] == [(-1, 2)] * 3
    without = OUTPUTS.model_copy(update={"charge": "", "multiplicity": ""})
    assert [(s.charge, s.multiplicity) for s in structures(path, "pymatgen", fields=without)] == [(0, 0)] * 3
