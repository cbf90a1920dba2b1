"""A bit that has changed in a part of a screen is noticed, and columns of one name are refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from structures import facts, rattled_molecule, small_model, to_structure

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.potential import Potential
from hydrazero.models.screening import FunctionSource, ScreenPlan, ScreenSettings, screen
from hydrazero.models.screening.settings import CHUNK
from hydrazero.models.task_facts import TargetFacts
from hydrazero.shards.errors import ConfigError, SourceError

COUNT = CHUNK + 676
SETTINGS = ScreenSettings(tasks=("task0",))


class Stop(Exception):
    pass


def waters() -> FunctionSource:
    return FunctionSource("waters", lambda: (to_structure(rattled_molecule("H2O", n), f"#{n}") for n in range(COUNT)))


def run(out: Path, settings: ScreenSettings, stop_after: int = COUNT + 1) -> dict | None:
    seen = []

    def progress(structures: int) -> None:
        seen.append(structures)
        if sum(seen) > stop_after:
            raise Stop

    plan = ScreenPlan(workers=0, atoms=300)
    return screen(Potential(small_model()), [waters()], out, settings, plan, progress).totals


def part_of(folder: Path) -> Path:
    (part,) = folder.glob("part-*.parquet")
    return part


def flip(path: Path, places: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for place in range(places):
        content[len(content) * (place + 1) // (places + 2)] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("out", ["out.parquet", "out"])
@pytest.mark.parametrize("top", [None, 5])
def test_a_bit_that_has_changed_stops_the_resumed_screen(tmp_path, out, top):
    settings = ScreenSettings(tasks=("task0",), top=top)
    with pytest.raises(Stop):
        run(tmp_path / out, settings, stop_after=CHUNK + 300)
    part = part_of(tmp_path / (".out.parquet.parts" if out == "out.parquet" else out))
    flip(part)
    with pytest.raises(SourceError, match=f"{part.name} is damaged: its content is not what was written; remove"):
        run(tmp_path / out, settings)
    part.unlink()
    counts = {"structures": COUNT, "written": top or COUNT, "refused": {}, "too_close": {}}
    assert run(tmp_path / out, settings) == counts


def test_a_resumed_screen_is_that_of_one_go(tmp_path):
    run(tmp_path / "whole.parquet", SETTINGS)
    with pytest.raises(Stop):
        run(tmp_path / "out.parquet", SETTINGS, stop_after=CHUNK + 300)
    run(tmp_path / "out.parquet", SETTINGS)
    whole, resumed = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "out"))
    assert resumed["index"] == whole["index"] and resumed["formula"] == whole["formula"]


@pytest.mark.parametrize("out", ["out.parquet", "out"])
def test_pages_of_results_have_checksums(tmp_path, out):
    run(tmp_path / out, SETTINGS)
    path = tmp_path / out if out == "out.parquet" else part_of(tmp_path / out)
    assert pq.read_table(path, page_checksum_verification=True).num_rows == COUNT
    flip(path)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path, page_checksum_verification=True)


def test_columns_of_one_name_are_refused(tmp_path):
    alone = small_model()
    settings = alone.settings.model_copy(update={"ensemble": 2})
    potential = Potential(AtomisticModel(settings, [facts("a"), facts("spread_a")]))
    with pytest.raises(ConfigError, match="a, spread_a have two columns 'energy_spread_a'"):
        screen(potential, [waters()], tmp_path / "out", ScreenSettings(tasks=("a", "spread_a")))
    assert not (tmp_path / "out").exists()
    gap = TargetFacts(of="structure", kind="scalar", unit="eV")
    with pytest.raises(ConfigError, match="'gap' and 'gap_predicted', and the second is the name of the first one's"):
        AtomisticModel(alone.settings, [facts("a", targets={"gap": gap, "gap_predicted": gap})])
