"""What guards a run, without one: which checkpoints are kept or damaged, how they are cut; spikes, full disks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.folders import (
    PART,
    Retention,
    best_checkpoint,
    checkpoints,
    file_sum,
    finish_checkpoint,
    folder_of,
    remove_leftovers,
    step_of,
    usable_checkpoint,
)
from hydrazero.trainer.engine.partition import ParameterPlace, Partition
from hydrazero.trainer.engine.step_guard import SETTLED, NonFiniteLossError, StepGuard
from hydrazero.trainer.records.run_files import MetricsWriter, read_metrics

layouts = st.tuples(st.sampled_from([0, 1, 3]), st.integers(1, 5))


@settings(max_examples=100)
@given(layouts, layouts, st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_pieces_cover_each_parameter_once(one, other, sizes):
    """Whatever piece one layout needs, the holders in another have all of it, each number once."""
    now, saved = layout(*one, sizes), layout(*other, sizes)
    for name, place in now.places.items():
        covered = np.zeros(place.size, dtype=int)
        for rank in range(now.ranks if now.stage else 1):
            piece = now.part(name, rank)
            if piece is None:
                continue
            covered[piece.begin : piece.begin + piece.size] += 1
            found = np.zeros(place.size, dtype=int)
            for holder in saved.holders(name, piece.begin, piece.begin + piece.size):
                part = saved.part(name, holder)
                assert part is not None
                found[part.begin : part.begin + part.size] += 1
            assert (found[piece.begin : piece.begin + piece.size] == 1).all()
        assert (covered == 1).all()


def layout(stage: int, ranks: int, sizes: list[int]) -> Partition:
    """One flat tensor of all parameters (ZeRO 1), of their parts (ZeRO 3), or one for each (no ZeRO)."""
    lengths = [-(-size // ranks) if stage == 3 else size for size in sizes]
    starts = [sum(lengths[:number]) for number in range(len(sizes))]
    places = {
        str(number): ParameterPlace(flat=0 if stage else number, start=starts[number] if stage else 0, size=size)
        for number, size in enumerate(sizes)
    }
    shares = (-(-sum(sizes) // ranks),) if stage == 1 else ()
    return Partition(stage=stage, ranks=ranks, precision="float32", places=places, shares=shares)


def test_lines_for_which_there_is_no_room_wait(tmp_path):
    """Whole, in their order, and with nothing of a line that was cut short."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]).returncode != 0:
        pytest.skip("this user may not mount a file system")
    try:
        writer = MetricsWriter(disk)
        assert writer.append({"step": 0, "kind": "a"}) is None
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        reasons = [writer.append({"step": step, "kind": "a" * 5000}) for step in (1, 2)]
        assert reasons == ["No space left on device"] * 2
        assert [row["step"] for row in read_metrics(disk)] == [0]
        (disk / "filler").unlink()
        assert writer.append({"step": 3, "kind": "a"}) is None
        assert [row["step"] for row in read_metrics(disk)] == [0, 1, 2, 3]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def made_up(run: Path, step: int, best: tuple[int, float] | None, last: int = 2) -> None:
    """Write a checkpoint of one file."""
    folder = folder_of(run, step)
    part = folder.with_name(folder.name + PART)
    part.mkdir(parents=True)
    (part / "weights").write_text(f"of step {step}")
    retention = Retention(last=last, best=None if best is None else {"step": best[0], "loss": best[1]})
    finish_checkpoint(part, {"weights": file_sum(part / "weights")}, retention)


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    for step, best in ((5, None), (10, (10, 0.4)), (15, (10, 0.4)), (20, (10, 0.4)), (25, (10, 0.4))):
        made_up(tmp_path, step, best)
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [10, 20, 25]
    assert best_checkpoint(tmp_path) == folder_of(tmp_path, 10)
    # Gone back to step 20, what came after it is of another run.
    made_up(tmp_path, 22, (22, 0.3))
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [20, 22]
    assert best_checkpoint(tmp_path) == folder_of(tmp_path, 22)
    for left in ("step-00000030.part", "step-00000010.removed"):
        (tmp_path / "checkpoints" / left).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.json",
        "step-00000020",
        "step-00000022",
    ]


@pytest.mark.parametrize("damage", ["changed", "missing", "sums"])
def test_damaged_checkpoints_are_named_and_left_aside(tmp_path, damage):
    for step in (5, 10, 15):
        made_up(tmp_path, step, None, last=9)

    def harm(step: int) -> None:
        folder = folder_of(tmp_path, step)
        if damage == "changed":
            (folder / "weights").write_text(f"of stop {step}")
        elif damage == "missing":
            (folder / "weights").unlink()
        else:
            (folder / "checksums.json").write_text("{}")

    harm(15)
    harm(10)
    found, said = usable_checkpoint(tmp_path)
    assert found == folder_of(tmp_path, 5) and len(said) == 2
    assert "step-00000015/" in said[0] and "step-00000010/" in said[1]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005"]
    harm(5)
    for _ in range(2):  # nothing is lost by asking
        with pytest.raises(ConfigError, match=r"every checkpoint of .* is damaged: .*step-00000005/.*step 0"):
            usable_checkpoint(tmp_path)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(0.02, 1.0), st.floats(1e-6, 1e6))
def test_spikes_are_told_from_noise(seed, noise, size):
    """At six standard deviations nothing of a normal log loss is a spike, and ten are, once the mean has settled."""
    generator, guard = np.random.default_rng(seed), StepGuard(3, 6.0)
    logs = generator.normal(0.0, noise, 3 * SETTLED)
    for number, value in enumerate(logs):
        if number < SETTLED:
            assert not guard.is_spike(size * 1e9)
        assert not guard.is_spike(size * float(np.exp(min(value, 2.5 * noise))))
        guard.done(size * float(np.exp(value)))
    spike = size * float(np.exp(20 * noise))
    assert guard.is_spike(spike) and not guard.is_spike(size * float(np.exp(-20 * noise)))
    other = StepGuard(3, 6.0)
    other.load(guard.state())
    assert other.is_spike(spike) and vars(other) == vars(guard)
    assert "far above that of the steps before" in other.skip(1, spike, ["a#1"])
    assert "a#1" in other.skip(2, spike, ["a#1"])
    with pytest.raises(NonFiniteLossError, match="3 steps in a row"):
        other.skip(3, spike, [])
