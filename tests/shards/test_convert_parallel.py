"""Conversion by several workers, killed and started again, on a full disk: the same shards, or none."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sources import metals, molecules, write_extxyz

from hydrazero.shards.convert.convert import Progress, convert
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.convert.workers import worker_processes
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.manifest import check_shard_files, read_manifest

HYDRAZERO = Path(sys.executable).with_name("hydrazero")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(out: Path, *sources: Path, workers: int = 1) -> list[str]:
    files = [str(source) for source in sources]
    return [str(HYDRAZERO), "convert", *files, "--task", "t", "--out", str(out), "--workers", str(workers)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One source large enough to be read by several workers at once, with repeats, and a small one."""
    folder = tmp_path_factory.mktemp("sources")
    large = write_extxyz(folder / "large.extxyz", molecules(300) * 12 + metals(20))
    assert large.stat().st_size > 0
    return [large, write_extxyz(folder / "small.extxyz", metals(30, seed=4))]


@pytest.fixture(scope="module")
def alone(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files that one worker makes, never interrupted."""
    out = tmp_path_factory.mktemp("alone") / "out"
    convert(sources, "t", out, ConvertSettings())
    return contents(out)


def test_any_number_of_workers_makes_the_same_bytes(tmp_path, sources, alone, monkeypatch):
    monkeypatch.setattr("hydrazero.shards.convert.convert.SLICED_BYTES", 1000)
    for workers in (2, 3):
        with worker_processes(workers) as team:
            convert(sources, "t", tmp_path / f"out{workers}", ConvertSettings(), workers=team)
        assert contents(tmp_path / f"out{workers}") == alone and len(alone) >= 4
    assert read_manifest(tmp_path / "out3").duplicate_count == 300 * 11


@pytest.mark.ranks
def test_mpirun_makes_the_same_bytes(tmp_path, sources, alone):
    launcher = [str(HYDRAZERO.with_name("mpirun")), "-n", "3", "--oversubscribe", "--allow-run-as-root"]
    result = subprocess.run(
        [*launcher, *command(tmp_path / "ranks", *sources)], capture_output=True, text=True, timeout=99
    )
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "ranks") == alone
    assert result.stdout.count("structures (train") == 1


def test_killed_and_started_again_it_goes_on(tmp_path, sources, alone):
    chunks = tmp_path / ".out.part" / "frames"
    process = subprocess.Popen(command(tmp_path / "out", *sources, workers=2), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(chunks.glob("*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    time.sleep(1.0)  # its workers notice
    done = {path.name: path.stat().st_mtime_ns for path in chunks.glob("0*.safetensors")}
    assert done, "it was killed before its first chunk"
    kept = tmp_path / "kept"
    shutil.copytree(chunks, kept)
    seen: dict[str, int] = {}

    def watch(progress: Progress) -> None:
        if progress.part == "sorting":
            seen.update({path.name: path.stat().st_mtime_ns for path in chunks.glob("0*.safetensors")})

    convert(sources, "t", tmp_path / "out", ConvertSettings(), progress=watch)
    assert {name: seen[name] for name in done} == done and len(seen) > len(done)
    assert contents(tmp_path / "out") == alone
    check_shard_files(read_manifest(tmp_path / "out"), tmp_path / "out", checksums=True)
    assert not (tmp_path / ".out.part").exists()


def test_unfinished_work_of_other_sources_is_not_used(tmp_path, sources):
    own = [Path(shutil.copy(source, tmp_path)) for source in sources]
    process = subprocess.Popen(command(tmp_path / "out", *own), stderr=subprocess.DEVNULL)
    while not list((tmp_path / ".out.part" / "frames").glob("*.safetensors")) and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    write_extxyz(own[0], molecules(50, seed=9))
    convert(own, "t", tmp_path / "out", ConvertSettings())
    assert read_manifest(tmp_path / "out").structures() == 80


def test_two_at_once_are_refused(tmp_path, sources):
    def second(progress: Progress) -> None:
        if progress.part == "sorting":
            with pytest.raises(ConfigError, match="another process is converting"):
                convert(sources, "t", tmp_path / "out", ConvertSettings())

    # The second one must not clear away what the first works with.
    convert(sources, "t", tmp_path / "out", ConvertSettings(), progress=second)
    check_shard_files(read_manifest(tmp_path / "out"), tmp_path / "out", checksums=True)


def test_a_full_disk(tmp_path, sources):
    """A real one: a file system of 1 MB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a file system")
    try:
        result = subprocess.run(command(disk / "out", *sources, workers=2), capture_output=True, text=True, timeout=99)
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        assert result.returncode == 1 and len(errors) == 1 and "No space left on device" in errors[0], result.stderr
        assert "Traceback" not in result.stderr and not (disk / "out").exists()
        assert not list(disk.rglob("*.tar"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        result = subprocess.run(command(disk / "out", *sources), capture_output=True, text=True, timeout=99)
        assert result.returncode == 0, result.stderr
        check_shard_files(read_manifest(disk / "out"), disk / "out", checksums=True)
        assert [path.name for path in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_memory_stays_bounded(tmp_path):
    """Five times the frames take the same memory (with small shards, of which one is held at a time)."""
    code = (
        "import sys; from pathlib import Path; from hydrazero.shards.convert import shards; "
        "from hydrazero.shards.convert.convert import convert; "
        "from hydrazero.shards.convert.settings import ConvertSettings; "
        "shards.SHARD_STRUCTURES = 1024; "
        "convert([Path(sys.argv[1])], 't', Path(sys.argv[2]), ConvertSettings()); "
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    peaks = []
    frames = molecules(500)
    for times in (4, 20):
        source = tmp_path / f"{times}.extxyz"
        write_extxyz(source, frames)
        source.write_text(source.read_text() * times)
        out = tmp_path / f"out{times}"
        result = subprocess.run(
            [sys.executable, "-c", code, str(source), str(out)], capture_output=True, text=True, timeout=99
        )
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout))
    assert peaks[1] - peaks[0] < 30_000, peaks  # kB; the frames themselves are some 70,000
