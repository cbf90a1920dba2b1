"""Too little shared memory is one sentence at the start, in a worker, or from the kernel; a wait obeys a stop."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from sources import make_shards, metals
from structures import small_model
from torch.utils.data import DataLoader, IterableDataset

from hydrazero.models.inference.potential import Potential
from hydrazero.models.screening.screener import ScreenPlan, screen
from hydrazero.models.screening.settings import ScreenSettings
from hydrazero.models.screening.sources import sources_of
from hydrazero.shards.errors import ConfigError, SourceError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.stream import shared_memory
from hydrazero.shards.stream.shared_memory import outputs_of
from hydrazero.shards.stream.stream import StreamSettings, TrainStream

FULL = SimpleNamespace(f_bavail=3, f_frsize=1_000_000)
"""What the system says of a /dev/shm with 3 MB left."""
ADVICE = r"/dev/shm has 3 MB free of \d+ MB; set {}, or give the container more \(docker run --shm-size=8g\)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), "metals", metals(30))


def stream_of(folder, workers: int = 1) -> TrainStream:
    shape = BatchShape(structures=1024, atoms=4096, slots=4096 * 24)
    return TrainStream(StreamSettings(folders=(str(folder),), cutoff=4.0, shape=shape, workers=workers), 0, 1)


def full(tensor):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_a_stream_says_at_the_start_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: FULL)
    with pytest.raises(ConfigError, match=ADVICE.format("data.workers = 0")):
        stream_of(folder)
    assert next(iter(stream_of(folder, workers=0))).numbers.shape == (4096,)


def test_small_batches_need_no_shared_memory(folder, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=1))
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    shape = BatchShape(structures=4, atoms=128, slots=128 * 24)
    here, there = (
        TrainStream(StreamSettings(folders=(str(folder),), cutoff=4.0, shape=shape, workers=workers), 0, 1)
        for workers in (0, 1)
    )
    for _, one, other in zip(range(3), here, there, strict=False):
        content = other.to_dict()
        for name, value in one.to_dict().items():
            assert torch.equal(value, content[name]) if isinstance(value, torch.Tensor) else name in content
        assert other.positions.untyped_storage().data_ptr() % 64 == 0  # as PyTorch aligns tensors


def test_a_worker_that_finds_no_room_says_so(folder, monkeypatch):
    stream = stream_of(folder)
    monkeypatch.setattr(os, "statvfs", lambda path: FULL)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(ConfigError, match=ADVICE.format("data.workers = 0")):
        next(iter(stream))


@pytest.mark.parametrize("at_start", [True, False])
def test_a_screen_does_not_blame_its_sources(folder, tmp_path, monkeypatch, at_start):
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    if not at_start:
        monkeypatch.setattr("hydrazero.models.screening.batch_loading.check_shared_memory", lambda *args: None)
    monkeypatch.setattr(os, "statvfs", lambda path: FULL)
    model = small_model()
    model.tasks[0].elements[:] = ["Au", "Cu"]
    settings = ScreenSettings(tasks=("task0",))
    with pytest.raises((ConfigError, SourceError), match=ADVICE.format("--workers 0")):
        plan = ScreenPlan(workers=1, atoms=4096)
        screen(Potential(model), sources_of([folder]), tmp_path / "out.parquet", settings, plan)


class Numbers(IterableDataset):
    """One number, and then what `then` does in the worker."""

    def __init__(self, then) -> None:
        self.then = then

    def __iter__(self):
        yield 1
        yield self.then()


def loader_of(then) -> DataLoader:
    return DataLoader(
        Numbers(then), batch_size=None, num_workers=1, prefetch_factor=1, multiprocessing_context="fork", timeout=0.2
    )


def test_a_worker_that_the_kernel_ends_is_recognised():
    outputs = outputs_of(loader_of(lambda: os.kill(os.getpid(), signal.SIGBUS)), 5_000_000, "data.workers = 0")
    with pytest.raises(ConfigError, match=r"shared memory is too small .* free of 5 MB; set data.workers = 0"):
        list(outputs)


def test_whoever_waits_for_a_batch_obeys_a_request_to_stop(monkeypatch):
    monkeypatch.setattr(shared_memory, "POLL", 0.2)
    monkeypatch.setattr(shared_memory, "PATIENCE", 0.8)
    reason = [""]
    outputs = outputs_of(loader_of(lambda: time.sleep(600)), 0, "data.workers = 0", lambda: reason[0])
    assert next(outputs) == 1
    signal.signal(signal.SIGALRM, lambda number, frame: reason.__setitem__(0, "SIGTERM"))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="SIGTERM asks to stop, and no batch has come for") as caught:
        next(outputs)
    assert time.monotonic() - began < 5.0 and caught.value.exit_status == 75


@pytest.mark.parametrize("does", ["stuck", "works"])
def test_a_worker_that_is_stuck_is_given_up(monkeypatch, does):
    monkeypatch.setattr(shared_memory, "POLL", 0.2)
    monkeypatch.setattr(shared_memory, "STUCK", 2.0)
    monkeypatch.setattr(shared_memory, "NEXT_TO_NOTHING", 0.1)

    def work() -> int:
        until = time.monotonic() + 6.0
        while time.monotonic() < until:
            pass
        return 2

    outputs = outputs_of(loader_of(lambda: time.sleep(600) if does == "stuck" else work()), 0, "data.workers = 0")
    assert next(outputs) == 1
    if does == "works":
        assert next(outputs) == 2
        return
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^DataLoader worker gave no batch and did nothing for 2 s, and was killed"):
        next(outputs)
    assert time.monotonic() - began < 10.0
