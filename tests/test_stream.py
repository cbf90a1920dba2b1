"""The stream: each structure exactly once a pass, deterministic, resumable to the batch; neighbours and packing."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import make_shards, metals, molecules
from structures import rattled_crystal, rattled_molecule, to_structure

from hydrazero.shards.errors import ConfigError, StructureError
from hydrazero.shards.graph import BatchShape, graph_sample
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.neighbours import neighbour_slots
from hydrazero.shards.packing import Packer, pack
from hydrazero.shards.plan import LanePlace, LanePlan, TaskPlan, mixture_repeats
from hydrazero.shards.stream import SplitReader, StreamSettings, TrainStream, evaluation_batches


def plans(sizes: list[list[int]], repeats: list[float] | None = None) -> list[TaskPlan]:
    return [
        TaskPlan(
            name=str(n), block_sizes=np.array(size, dtype=np.int64), repeats=1.0 if repeats is None else repeats[n]
        )
        for n, size in enumerate(sizes)
    ]


block_sizes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(block_sizes, st.integers(1, 7), st.integers(0, 3), st.integers(0, 99))
def test_each_structure_once_an_epoch_whatever_the_lanes(sizes, lanes, epoch, seed):
    delivered = Counter(
        item
        for lane in range(lanes)
        for item in LanePlan(plans(sizes), lane=lane, lanes=lanes, seed=seed).walk(LanePlace(epoch=epoch), epochs=1)
    )
    expected = {(t, b, r) for t, blocks in enumerate(sizes) for b, size in enumerate(blocks) for r in range(size)}
    assert set(delivered) == expected and set(delivered.values()) == {1}


def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[tuple[int, int, int]]:
        return list(LanePlan(plans([[50, 50], [7]]), lane=0, lanes=1, seed=seed).walk(LanePlace(epoch=epoch), epochs=1))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_tasks_are_interleaved_evenly():
    walk = LanePlan(plans([[256] * 4, [128]]), lane=0, lanes=1, seed=0).walk(LanePlace(), epochs=1)
    tasks = [task for task, _, _ in walk]
    for first in range(0, len(tasks) - 90, 90):
        assert tasks[first : first + 90].count(1) == pytest.approx(10, abs=2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 400), st.integers(1, 3))
def test_a_walk_goes_on_where_it_stopped(stop, lanes):
    def plan() -> LanePlan:
        return LanePlan(plans([[40, 33], [10]]), lane=0, lanes=lanes, seed=3)

    whole = list(islice(plan().walk(LanePlace()), stop + 50))
    place = LanePlace()
    first = list(islice(plan().walk(place), stop))
    rest = list(islice(plan().walk(LanePlace(epoch=place.epoch, delivered=list(place.delivered))), 50))
    assert first + rest == whole


def test_temperature_repeats_small_tasks():
    repeats = mixture_repeats([100, 10_000], 2.0)
    assert repeats[0] * 100 + repeats[1] * 10_000 == pytest.approx(10_100)
    assert repeats[0] * 100 / (repeats[1] * 10_000) == pytest.approx(0.1)  # sqrt of the ratio of sizes
    assert mixture_repeats([3, 5], 1.0) == pytest.approx([1.0, 1.0])
    with pytest.raises(ConfigError, match="temperature"):
        mixture_repeats([1], 0.5)
    counts: Counter[int] = Counter()
    sizes = [[100], [250] * 40]
    for lane in range(2):
        walk = LanePlan(plans(sizes, repeats), lane=lane, lanes=2, seed=0).walk(LanePlace(), epochs=3)
        counts.update(task for task, _, _ in walk)
    assert counts[0] == pytest.approx(3 * repeats[0] * 100, rel=0.05)
    assert counts[1] == pytest.approx(3 * repeats[1] * 10_000, rel=0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("stream")
    return str(make_shards(root, "molecules", molecules(120))), str(make_shards(root, "metals", metals(30)))


def stream_settings(folders: tuple[str, ...], workers: int = 0, **values: object) -> StreamSettings:
    shape = BatchShape(structures=8, atoms=48, slots=48 * 32)
    return StreamSettings(folders=folders, cutoff=4.0, shape=shape, workers=workers, **values)  # type: ignore[arg-type]


def ids(batch: object) -> list[str]:
    return batch.source_ids()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_gives_the_very_same_batches(folders, workers):
    options = stream_settings(folders, workers)
    whole = TrainStream(options, 0, 1)
    walk = iter(whole)
    for _ in range(7):
        next(walk)
    state = whole.state()
    expected = [next(walk) for _ in range(9)]
    again = iter(TrainStream(options, 0, 1, state))
    for batch in expected:
        same = next(again)
        assert ids(same) == ids(batch)
        for key in ("positions", "neighbours", "shifts", "reverse", "energy", "forces", "task"):
            assert torch.equal(same[key], batch[key])


def test_ranks_share_an_epoch(folders):
    structures = sum(read_manifest(folder).structures("train") for folder in folders)
    seen: Counter[str] = Counter()
    for rank in range(2):
        stream = TrainStream(stream_settings(folders), rank, 2)
        for batch in stream:
            # Everything handed out while the lane was in epoch 0, and what of it still waits, is the rank's share.
            if stream.epoch > 0:
                break
            seen.update(ids(batch))
            pending = stream.state()["lanes"][0]["pending"]
        seen.update(["pending"] * len(pending))
    named = [name for name in seen if name != "pending"]
    assert max(seen[name] for name in named) == 1
    assert abs(len(named) + seen["pending"] - structures) <= 2 * 8


def test_a_stream_of_other_ranks_is_refused(folders):
    state = TrainStream(stream_settings(folders), 0, 1).state()
    with pytest.raises(ConfigError, match="1 ranks"):
        TrainStream(stream_settings(folders), 0, 2, state)


def test_evaluation_counts_each_structure_once(folders):
    names = [
        n for rank in range(3) for b in evaluation_batches(stream_settings(folders), "val", rank, 3) for n in ids(b)
    ]
    assert len(names) == len(set(names)) == sum(read_manifest(folder).structures("val") for folder in folders)


def test_batches_have_a_fixed_size_and_true_masks(folders):
    options = stream_settings(folders)
    sizes: dict[int, set[tuple[int, ...]]] = {}
    for batch in islice(TrainStream(options, 0, 1), 30):
        slots = batch.neighbours.shape[1]
        sizes.setdefault(slots, set()).add((batch.task.shape[0], *batch.positions.shape))
        assert batch.atom_mask.sum() == batch.n_atoms.sum() <= options.shape.atoms_with(slots)
        assert batch.structure_mask.sum() == len(ids(batch))
        flat = batch.slot_mask.reshape(-1)
        assert (batch.reverse.reshape(-1)[batch.reverse.reshape(-1)] == torch.arange(flat.numel())).all()
        receiver = torch.arange(flat.numel()) // slots
        assert (batch.neighbours.reshape(-1)[batch.reverse.reshape(-1)] == receiver).all()
        pair = batch.positions[batch.neighbours] + batch.shifts - batch.positions[:, None]
        distance = pair.norm(dim=-1)
        assert (distance[batch.slot_mask] <= 4.0 + 1e-5).all() and (distance[~batch.slot_mask] == 0).all()
    assert all(len(shapes) == 1 for shapes in sizes.values()) and len(sizes) >= 2


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, False)])
def test_neighbours_are_those_of_ase(pbc):
    atoms = rattled_crystal(1)
    atoms.pbc = pbc
    i, j, vectors = neighbor_list("ijD", atoms, 4.0)
    ours = neighbour_slots(atoms.positions, atoms.cell[:], atoms.pbc, 4.0)
    vector = atoms.positions[ours.sender] + ours.shift - atoms.positions[ours.receiver]

    def rows(*columns: np.ndarray) -> list[tuple[float, ...]]:
        return sorted(map(tuple, np.round(np.column_stack(columns), 6) + 0.0))

    assert rows(ours.receiver, ours.sender, vector) == rows(i, j, vectors)
    np.testing.assert_array_equal(ours.receiver[ours.reverse], ours.sender)
    np.testing.assert_allclose(vector[ours.reverse], -vector, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["H2O", "CH4", "C6H6", "H2", "crystal"]), min_size=1, max_size=60), st.integers(1, 6))
def test_packing_loses_nothing_and_never_overfills(names, structures):
    shape = BatchShape(structures=structures, atoms=30, slots=30 * 48)
    made = [
        to_structure(rattled_crystal() if n == "crystal" else rattled_molecule(n), f"{k}") for k, n in enumerate(names)
    ]
    samples = [graph_sample(structure, 0, 4.0) for structure in made]
    packed = list(pack(samples, shape))
    assert sorted(s.structure.source_id for _, batch in packed for s in batch) == sorted(s.source_id for s in made)
    for slots, batch in packed:
        assert len(batch) <= structures and sum(len(s.structure) for s in batch) <= shape.atoms_with(slots)
        assert all(s.neighbours.max_degree <= slots for s in batch)


def test_a_structure_too_large_for_any_batch_is_named():
    sample = graph_sample(to_structure(rattled_crystal(), "big.xyz#4"), 0, 4.0)
    with pytest.raises(StructureError, match=r"big.xyz#4 has 8 atoms .* batch.atoms to at least 8 and batch.slots"):
        Packer(BatchShape(structures=4, atoms=7, slots=10_000)).add(sample)


def test_reading_from_shards_gives_what_was_written(folders):
    reader = SplitReader(stream_settings(folders), "train")
    sample = reader.sample(1, 0, 3)
    assert (
        sample.task == 1
        and sample.structure.pbc.all()
        and Path(sample.structure.source_id).suffix.startswith(".extxyz")
    )
