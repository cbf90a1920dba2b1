"""Where shards lie and what happens to damaged ones: web servers, pipes, broken reads, skipping, shared memory."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from sources import make_shards, metals, molecules

from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.location import Location, ShardCommand
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.stream import block_reader
from hydrazero.shards.stream.batch_buffer import BY_VALUE
from hydrazero.shards.stream.block_reader import BlockCache, BlockReader
from hydrazero.shards.stream.stream import StreamSettings, TrainStream
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.config.tasks import task_manifest

SHAPE = BatchShape(structures=8, atoms=48, slots=48 * 48)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("sources"), "molecules", molecules(700))


def settings_for(folder: Location, **values: object) -> StreamSettings:
    return StreamSettings(folders=(folder,), cutoff=4.0, shape=SHAPE, workers=0, **values)  # type: ignore[arg-type]


def first_names(folder: Location, batches: int = 6) -> list[list[str]]:
    return [batch.source_ids() for batch in islice(TrainStream(settings_for(folder), 0, 1), batches)]


class Handler(SimpleHTTPRequestHandler):
    """A web server that knows ranges, and whose answers break off as often as it is told."""

    broken = 0
    ranges: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if wanted:
            begin, end = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            data = data[begin : end + 1]
            Handler.ranges.append(wanted)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if wanted and Handler.broken > 0:
            Handler.broken -= 1
            self.wfile.write(data[: len(data) // 2])
            return
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    Handler.broken, Handler.ranges = 0, []

    def handler(*arguments: object) -> Handler:
        return Handler(*arguments, directory=str(shards.parent))  # type: ignore[arg-type]

    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}/molecules"
    http.shutdown()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens web addresses with curl")
def test_shards_on_a_web_server(shards, server):
    assert first_names(server) == first_names(str(shards))
    size = read_manifest(shards).splits["train"][0].bytes
    asked = [int(text.split("-")[1]) - int(text.split("=")[1].split("-")[0]) + 1 for text in Handler.ranges]
    assert asked and max(asked) < size  # single blocks, not the whole shard


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens web addresses with curl")
def test_a_broken_read_is_tried_again(shards, server, monkeypatch):
    monkeypatch.setattr(block_reader, "RETRY_AFTER", (0.01, 0.01))
    Handler.broken = 2
    assert BlockReader(server, "train").read(1).names == BlockReader(shards, "train").read(1).names
    Handler.broken = 3
    with pytest.raises(ShardError, match=r"train-000000.tar, block 1"):
        BlockReader(server, "train").read(1)
    with pytest.raises(ShardError, match=r"elsewhere/manifest.json cannot be read"):
        BlockReader(server.replace("molecules", "elsewhere"), "train")


def test_shards_through_a_pipe(shards):
    assert first_names(ShardCommand(line=f"cat {shards}/{{}}")) == first_names(str(shards))


def damage(shards: Path, folder: Path, block: int = 1) -> Path:
    """A copy of the shards in which one byte of a training block is another."""
    shutil.copytree(shards, folder)
    shard = read_manifest(folder).splits["train"][0]
    data = bytearray((folder / shard.file).read_bytes())
    data[shard.block_offsets[block] + 2000] ^= 0xFF
    (folder / shard.file).write_bytes(data)
    return folder


def test_a_damaged_block_stops_the_run_or_is_skipped_and_counted(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(block_reader, "RETRY_AFTER", (0.0, 0.0))
    folder = str(damage(shards, tmp_path / "molecules"))
    with pytest.raises(ShardError, match=r"train-000000.tar, block 1 does not have the checksum"):
        list(islice(TrainStream(settings_for(folder), 0, 1), 200))
    stream = TrainStream(settings_for(folder, on_bad_shard="skip"), 0, 1)
    seen: Counter[str] = Counter()
    for batch in stream:
        if stream.epoch > 0:
            break
        seen.update(batch.source_ids())
    shard = read_manifest(folder).splits["train"][0]
    lost = BlockReader(shards, "train").read(1).names
    ((reason, count),) = stream.skipped.items()
    assert count == len(lost) == shard.block_structures[1] and "block 1 does not have the checksum" in reason
    assert not set(seen) & set(lost) and max(seen.values()) == 1


def test_shards_of_another_conversion_are_noticed(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(block_reader, "RETRY_AFTER", ())
    other = make_shards(tmp_path, "molecules", molecules(700, seed=5))
    name = "train-000000.tar"
    mixed = tmp_path / "mixed"
    shutil.copytree(shards, mixed)
    shutil.copy(other / name, mixed / name)
    with pytest.raises(
        ShardError, match=r"mixed/train-000000.tar, block 0 (does not have the check|is not at the place)"
    ):
        BlockReader(mixed, "train").read(0)


def test_the_cache_is_bounded(shards):
    reader = BlockReader(shards, "train")
    one = reader.read(0).nbytes
    cache = BlockCache([reader], most_bytes=int(1.5 * one))
    first = cache.block(0, 0)
    assert cache.block(0, 0) is first
    cache.block(0, 1)
    assert cache.block(0, 0) is not first


@pytest.mark.parametrize("slots", [SHAPE.slots, 40_000], ids=["small", "large"])
def test_large_batches_come_through_shared_memory(shards, slots):
    """From worker processes the tensors of large batches are not copied through a pipe."""
    shape = SHAPE.model_copy(update={"slots": slots})
    batch = next(iter(TrainStream(StreamSettings(folders=(str(shards),), cutoff=4.0, shape=shape, workers=1), 0, 1)))
    tensors = [value for value in batch.to_dict().values() if isinstance(value, torch.Tensor)]
    is_large = sum(tensor.nbytes for tensor in tensors) > BY_VALUE
    assert is_large == (slots > SHAPE.slots)
    assert len(tensors) > 15 and {tensor.is_shared() for tensor in tensors} == {is_large}


RUN = """
[run]
out = "{out}"
[[tasks]]
name = "dense"
shards = "{shards}"
[model]
cutoff = {cutoff}
[batch]
{batch}
[train]
steps = 1
"""


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ("structures = 4\natoms = 7\nslots = 4000", "structure of 8 atoms.* set batch.atoms to at least 8"),
        (
            "structures = 4\natoms = 8\nslots = 200",
            r"dense.extxyz#\d+ takes 384 neighbour slots within 5 Å.* at least 384",
        ),
        ("structures = 4\natoms = 8\nslots = 400\nedges = 99", r"dense.extxyz#\d+ has 336 edges .* or to 0"),
    ],
)
def test_a_batch_too_small_for_a_structure_is_refused_at_the_start(tmp_path, batch, words):
    folder = make_shards(tmp_path, "dense", metals(40))
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(out=tmp_path / "run", shards=folder, cutoff=5.0, batch=batch))
    config = load_run_config(path)
    with pytest.raises(ConfigError, match=words):
        task_manifest(config.tasks[0], config.data, config.batch, config.model.cutoff)
