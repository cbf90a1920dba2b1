"""Damaged manifests, blocks and model files with right checksums, made from valid ones by seeded changes.

`python damaged_files.py KIND SEED SECONDS EXAMPLES` checks examples in this process, under limits of time and
memory: each file loads with finite numbers, or is refused by a HydrazeroError of one line.
"""

from __future__ import annotations

import base64
import faulthandler
import io
import json
import math
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from ase import Atoms

from hydrazero.models import load_model
from hydrazero.models.inference.model_card import sha256_of
from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.graphs.graph import collate, graph_sample, shape_holding
from hydrazero.shards.manifest import SPLITS, check_shard_files, read_manifest
from hydrazero.shards.stream import block_reader
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.stream.deal import Deal, LanePlace, TaskPlan

FILES = Path(__file__).parents[1] / "data" / "older_files"
HANG = 60
"""Seconds for one example."""
MEMORY = 8 << 30
"""Bytes that the process may take."""
ODD: list[Any] = [None, True, -1, 0, 1, 7, 14.5, 1e-9, 1e9, 2**62, 10**18, 10**30, -(2**70), math.nan, math.inf, -0.0]
ODD += ["", "x", "Xx", "H", "a\nb", "\x1b[31m", "../x", "/etc/passwd", "nan", [], {}, [[]], [1, 2], {"a": 1}, "é" * 300]
SPECIAL = (math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, -1.0, 1e-40, 5e-4, 0.06, 1e9, 255.0)

Generator = np.random.Generator


def changed(document: Any, rng: Generator) -> Any:
    """Return a JSON document with one change at a place chosen at random; the document itself is changed."""
    here = document
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            break
        key = keys[int(rng.integers(len(keys)))]
        if not isinstance(here[key], dict | list) or not here[key] or rng.random() < 0.1:
            break
        here = here[key]
    if not keys:
        return ODD[int(rng.integers(len(ODD)))]
    way, value = int(rng.integers(6)), here[key]
    if way == 0:
        del here[key]
    elif way == 1 and isinstance(value, int | float):
        here[key] = value * float(rng.choice([-1.0, 0.5, 2.0, 1e3, 1e-3, 1e12]))
    elif way == 2 and isinstance(value, int):
        here[key] = value + int(rng.choice([-1, 1, 256, 512]))
    elif way == 3 and isinstance(here, list):
        here.insert(key, value)
    elif way == 3:
        here[str(key) + "x"] = here.pop(key)
    elif way == 4 and isinstance(value, str):
        here[key] = value + str(rng.choice(["\n", "\0", "/..", " ", "é", "1"]))
    else:
        here[key] = ODD[int(rng.integers(len(ODD)))]
    return document


def damaged_bytes(data: bytes, rng: Generator) -> bytes:
    """Return bytes with a few of them changed, removed or added."""
    content = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(content)))
        match int(rng.integers(3)):
            case 0:
                content[place] ^= 1 << int(rng.integers(8))
            case 1:
                del content[place : place + int(rng.integers(1, 40))]
            case _:
                content[place:place] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(content)


def deep(rng: Generator) -> bytes:
    """Return a JSON text that is nested without end."""
    return bytes(rng.choice([b"[", b'{"a":', b"[[0],"]) * int(rng.choice([500, 100_000])))


# Manifests


def manifest_example(folder: Path, rng: Generator) -> None:
    """Damage a manifest, and read all structures by it: they are those that were written, or an error says why not."""
    source = FILES / "shards" / str(rng.choice(["qm", "metals", "water"]))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "manifest.json"
    if rng.random() < 0.15:
        path.write_bytes(deep(rng) if rng.random() < 0.3 else damaged_bytes(path.read_bytes(), rng))
    else:
        document = json.loads(path.read_text())
        for _ in range(int(rng.integers(1, 3))):
            document = changed(document, rng)
        path.write_text(json.dumps(document))
    manifest = read_manifest(folder)
    check_shard_files(manifest, folder)
    expected = read_manifest(source)
    for split in SPLITS:
        here, there = BlockReader(folder, split, manifest), BlockReader(source, split, expected)
        if len(here):
            plan = TaskPlan(name="task", block_sizes=here.block_sizes)
            list(Deal([plan], lanes=2, seed=0).walk(0, LanePlace(), epochs=1))
        # A list of shards, or of a shard's blocks, may be empty: fewer structures are then said to be there.
        for number in range(len(here)):
            block = here.read(number)
            originals = [there.read(other) for other in range(len(there))]
            assert any(np.array_equal(block.energy, original.energy) for original in originals)
            assert any(np.array_equal(block.positions, original.positions) for original in originals)


# Blocks


def block_example(folder: Path, rng: Generator) -> None:
    """Damage a block, with right checksums, and make a batch of it: all numbers are finite."""
    source = FILES / "shards" / str(rng.choice(["qm", "metals"]))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    document = json.loads((folder / "manifest.json").read_text())
    shard = document["splits"]["train"][0]
    with tarfile.open(folder / shard["file"]) as tar:
        member = tar.next()
        assert member is not None
        data = tar.extractfile(member).read()  # type: ignore[union-attr]
    data = damaged_bytes(data, rng) if rng.random() < 0.2 else damaged_columns(data, rng)
    member.size, content = len(data), io.BytesIO()
    header = tarfile.TarInfo(member.name)
    header.size = len(data) if rng.random() < 0.97 else int(rng.choice([0, len(data) * 2, 10**12]))
    content.write(header.tobuf())
    content.write(data)
    content.write(bytes(-len(data) % 512 + 1024))
    (folder / shard["file"]).write_bytes(content.getvalue())
    shard["bytes"], shard["block_crc32"] = len(content.getvalue()), [zlib.crc32(data)]
    (folder / "manifest.json").write_text(json.dumps(document))
    block = BlockReader(folder, "train").read(0)
    samples = [graph_sample(block.structure(row), 0, 4.0) for row in range(len(block))]
    assert sum(len(sample.structure) for sample in samples) == len(block.numbers)
    for sample in samples:
        structure = sample.structure
        assert np.isfinite(structure.positions).all() and np.isfinite(structure.cell).all()
        assert structure.energy is None or np.isfinite(structure.energy)
        assert structure.forces is None or np.isfinite(structure.forces).all()
        assert structure.numbers.min() > 0 and structure.numbers.max() < 119
    batch = collate(samples, shape_holding(samples), torch.float32)
    for name, value in batch.to_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert bool(torch.isfinite(value).all()), name


def damaged_columns(data: bytes, rng: Generator) -> bytes:
    """Return a block whose columns have one or two changes."""
    columns = dict(safetensors.numpy.load(data))
    for _ in range(int(rng.integers(1, 3))):
        name = str(rng.choice(list(columns)))
        column = columns[name].copy()
        match int(rng.integers(7)):
            case 0:
                del columns[name]
                continue
            case 1:
                kinds = ["float16", "float32", "float64", "int16", "int32", "int64", "uint8", "bool"]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    column = column.astype(str(rng.choice(kinds)))
            case 2:
                column = column[: int(rng.integers(len(column) + 1))]
            case 3:
                column = np.concatenate([column, column[: int(rng.integers(1, 4))]])
            case 4:
                column = column.reshape(-1) if rng.random() < 0.5 else column[None]
            case 5:
                columns[str(rng.choice(["stress", "forces", "target.a", "atom_target.a", "other", "target."]))] = column
                continue
            case _:
                flat = column.reshape(-1)
                with np.errstate(all="ignore"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    value = np.float64(rng.choice(SPECIAL)).astype(column.dtype)
                flat[rng.integers(len(flat), size=int(rng.choice([1, 3, len(flat)])))] = value
        columns[name] = column
    return safetensors.numpy.save({name: np.ascontiguousarray(column) for name, column in columns.items()})


# Model files


def model_example(folder: Path, rng: Generator) -> None:
    """Damage a model file, with a right checksum of its weights, and use it: all numbers are finite."""
    source = FILES / "models" / f"{rng.choice(['painn', 'egnn', 'mace', 'lora'])}.safetensors"
    path = folder / "model.safetensors"
    with safetensors.safe_open(str(source), framework="pt") as file:
        header = dict(file.metadata())
    weights = safetensors.torch.load_file(str(source))
    match int(rng.integers(8)):
        case 0:
            path.write_bytes(damaged_bytes(source.read_bytes(), rng))
        case 1:
            weights = damaged_weights(weights, rng)
            header["weights_sha256"] = sha256_of(weights)
        case 2:
            key = str(rng.choice(list(header)))
            header[key] = str(rng.choice(["", "9", "{", "[" * 100_000, header[key][: len(header[key]) // 2]]))
        case 3:
            header["card"] = json.dumps(changed(json.loads(header["card"]), rng))
        case _:
            facts = json.loads(zlib.decompress(base64.b85decode(header["facts"])))
            for _ in range(int(rng.integers(1, 3))):
                facts = changed(facts, rng)
            text = deep(rng) if rng.random() < 0.02 else json.dumps(facts).encode()
            header["facts"] = base64.b85encode(zlib.compress(text)).decode()
    if not path.exists():
        safetensors.torch.save_file(weights, str(path), metadata=header)
    potential = load_model(path)
    for task in potential.tasks:
        facts_ = potential.facts(task)
        symbols = (facts_.elements * 3)[:3]
        atoms = Atoms(symbols, positions=[[0, 0, 0], [0.96, 0, 0], [0, 0.96, 0.1]])
        atoms.info["multiplicity"] = 1
        (row,) = potential.predict([atoms], tasks=[task])
        numbers = [value for value in row.values() if isinstance(value, float | np.ndarray)]
        numbers += [np.asarray(value) for value in row["targets"].values()]
        assert all(np.isfinite(value).all() for value in numbers), row


def damaged_weights(weights: dict[str, torch.Tensor], rng: Generator) -> dict[str, torch.Tensor]:
    """Return weights of which one has changed."""
    name = str(rng.choice(list(weights)))
    value = weights[name].clone()
    match int(rng.integers(6)):
        case 0:
            del weights[name]
            return weights
        case 1:
            value = value.to(rng.choice(np.array([torch.float16, torch.float64, torch.bfloat16, torch.int32])))
        case 2:
            value = value[:1].repeat(2, *[1] * (value.dim() - 1)).contiguous()
        case 3:
            value = value.reshape(-1)
        case 4:
            weights[f"{name}x"] = value
            return weights
        case _:
            value.view(-1)[int(rng.integers(value.numel()))] = float(rng.choice([math.nan, math.inf, 1e38]))
    weights[name] = value
    return weights


EXAMPLES: dict[str, Callable[[Path, Generator], None]] = {
    "manifest": manifest_example,
    "block": block_example,
    "model": model_example,
}


def refused(kind: str, seed: int) -> str:
    """Check one example; return the sentence by which it is refused, "" if it is used."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            EXAMPLES[kind](Path(name), np.random.default_rng([seed, len(kind)]))
        except HydrazeroError as error:
            sentence = str(error)
            assert sentence and "\n" not in sentence and len(sentence) < 2000, repr(sentence)
            return sentence
    return ""


def main(kind: str, seed: int, seconds: float, most: int) -> None:
    block_reader.RETRY_AFTER = ()  # damage does not pass by waiting
    end, count, taken = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end and count < most:
        faulthandler.dump_traceback_later(HANG, exit=True)
        print(f"{kind} {seed + count}", file=sys.stderr, flush=True)
        taken += not refused(kind, seed + count)
        faulthandler.cancel_dump_traceback_later()
        count += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{kind}: {count:,} files, of which {taken:,} were used; at most {peak:,} MB of memory")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
