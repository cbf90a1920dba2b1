"""The stream: each structure exactly once a pass, deterministic, resumable to the batch; neighbours and packing."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
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
from hydrazero.shards.graphs.graph import BatchShape, graph_sample
from hydrazero.shards.graphs.neighbours import ROW_SLOTS, half_pairs, lay_out
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.stream.deal import Deal, LanePlace, TaskPlan, lane_number, mixture_repeats
from hydrazero.shards.stream.packing import Packer, pack
from hydrazero.shards.stream.state import LaneState, rank_state, saved_state, start_of_stream
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, TrainStream, evaluation_batches


def plans(sizes: list[list[int]], repeats: list[float] | None = None) -> list[TaskPlan]:
    return [
        TaskPlan(
            name=str(n), block_sizes=np.array(size, dtype=np.int64), repeats=1.0 if repeats is None else repeats[n]
        )
        for n, size in enumerate(sizes)
    ]


block_sizes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=60)
@given(block_sizes, st.integers(1, 7), st.integers(0, 3), st.integers(0, 99))
def test_each_structure_once_an_epoch_whatever_the_lanes(sizes, lanes, epoch, seed):
    delivered = Counter(
        item
        for lane in range(lanes)
        for item in Deal(plans(sizes), lanes=lanes, seed=seed).walk(lane, LanePlace(epoch=epoch), epochs=1)
    )
    expected = {(t, b, r) for t, blocks in enumerate(sizes) for b, size in enumerate(blocks) for r in range(size)}
    assert set(delivered) == expected and set(delivered.values()) == {1}


def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[tuple[int, int, int]]:
        return list(Deal(plans([[50, 50], [7]]), lanes=1, seed=seed).walk(0, LanePlace(epoch=epoch), epochs=1))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_tasks_are_interleaved_evenly():
    walk = Deal(plans([[256] * 4, [128]]), lanes=1, seed=0).walk(0, LanePlace(), epochs=1)
    tasks = [task for task, _, _ in walk]
    for first in range(0, len(tasks) - 90, 90):
        assert tasks[first : first + 90].count(1) == pytest.approx(10, abs=2)


@settings(max_examples=20)
@given(st.integers(0, 400), st.integers(1, 3))
def test_a_walk_goes_on_where_it_stopped(stop, lanes):
    deal = Deal(plans([[40, 33], [10]]), lanes=lanes, seed=3)
    whole = list(islice(deal.walk(0, LanePlace()), stop + 50))
    place = LanePlace()
    first = list(islice(deal.walk(0, place), stop))
    rest = list(islice(deal.walk(0, LanePlace(epoch=place.epoch, delivered=list(place.delivered))), 50))
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
        walk = Deal(plans(sizes, repeats), lanes=2, seed=0).walk(lane, LanePlace(), epochs=3)
        counts.update(task for task, _, _ in walk)
    assert counts[0] == pytest.approx(3 * repeats[0] * 100, rel=0.05)
    assert counts[1] == pytest.approx(3 * repeats[1] * 10_000, rel=0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("stream")
    return str(make_shards(root, "molecules", molecules(120))), str(make_shards(root, "metals", metals(30)))


def stream_settings(folders: tuple[str, ...], workers: int = 0, **values: object) -> StreamSettings:
    shape = BatchShape(structures=8, atoms=48, slots=48 * 48)
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
    saved = whole.saved_state([whole.state()])
    expected = [next(walk) for _ in range(9)]
    again = iter(TrainStream(options, 0, 1, saved))
    for batch in expected:
        same = next(again)
        assert ids(same) == ids(batch)
        for key in ("positions", "neighbours", "row_atom", "shifts", "reverse", "energy", "forces", "task"):
            assert torch.equal(same[key], batch[key])


@pytest.mark.parametrize("numbers", [[(1, 1), (2, 1)], [(2, 2), (1, 1), (3, 1)], [(3, 1), (2, 2)], [(2, 1), (2, 1)]])
def test_an_interrupted_epoch_on_other_ranks_gives_each_structure_once(folders, numbers):
    """Stopped and gone on with other ranks and workers: every name is counted, in real batches from real tars."""
    small = BatchShape(structures=2, atoms=12, slots=12 * 48)
    seen: Counter[tuple[int, str]] = Counter()
    saved = None
    for ranks, workers in numbers:
        options = replace(stream_settings(folders, workers), shape=small)
        streams = [TrainStream(options, rank, ranks, saved) for rank in range(ranks)]
        for rank, stream in enumerate(streams):
            for batch in islice(stream, 6 + 2 * rank):
                seen.update(zip(batch.task[batch.structure_mask].tolist(), ids(batch), strict=True))
        saved = streams[0].saved_state([stream.state() for stream in streams])
    reader = SplitReader(options, "train")
    names = [[reader.readers[t].read(b).names for b in range(len(reader.readers[t]))] for t in range(len(folders))]
    left = Counter(
        (task, names[task][block][row]) for task, block, row in what_is_left(reader.plans(), numbers[-1], saved)
    )
    assert min(seen.values()) >= 1 and left
    once = {(task, name) for task, blocks in enumerate(names) for block in blocks for name in block}
    assert set(seen + left) == once and len(set((seen + left).values())) == 1


def what_is_left(tasks: list[TaskPlan], number: tuple[int, int], saved: dict) -> list[tuple[int, int, int]]:
    """What a saved place has still to deliver up to the end of its foremost lane's epoch: drawn and waiting, or not."""
    start = start_of_stream(tasks, 0, *number, saved)
    rest = start.deal.rest([lane.place for lane in start.lanes])
    items = [item for lane in start.lanes for item in lane.pending]
    for task, pieces in enumerate(rest.pieces):
        items += [(task, int(p[1]), int(row)) for p in pieces for row in start.deal.piece_rows(task, p)]
    return items


@settings(max_examples=60)
@given(
    block_sizes,
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 2), st.integers(0, 120)), min_size=1, max_size=4),
    st.integers(0, 6),
)
def test_each_structure_once_however_often_the_lanes_change(sizes, legs, held_back):
    """Legs of (ranks, workers, structures); `held_back` structures are drawn and wait for a batch at each stop."""
    tasks = plans(sizes)
    delivered: Counter[tuple[int, int, int]] = Counter()
    saved, foremost = None, 0
    for ranks, workers, steps in legs:
        start = start_of_stream(tasks, 0, ranks, workers, saved)
        states = []
        for lane, state in enumerate(start.lanes):
            place, waiting = state.place, list(state.pending)
            for item in islice(start.deal.walk(lane, place), (steps + 7 * lane) % (steps + 1)):
                waiting.append(item)
                if len(waiting) > held_back:
                    delivered[waiting.pop(0)] += 1
            states.append(LaneState(epoch=place.epoch, delivered=tuple(place.delivered), pending=tuple(waiting)))
            foremost = max(foremost, place.epoch)
        of_ranks = [
            rank_state([states[lane_number(rank, worker, ranks)] for worker in range(workers)], 0)
            for rank in range(ranks)
        ]
        saved = saved_state("", start.past, of_ranks)
    delivered.update(what_is_left(tasks, (ranks, workers), saved))
    everything = {(t, b, r) for t, blocks in enumerate(sizes) for b, size in enumerate(blocks) for r in range(size)}
    assert set(delivered) == everything and set(delivered.values()) == {foremost + 1}


@settings(max_examples=40)
@given(block_sizes, st.integers(1, 4), st.integers(1, 3), st.floats(1.0, 8.0), st.integers(0, 3))
def test_lanes_and_ranks_get_equally_many_pieces(sizes, ranks, workers, temperature, epoch):
    """Within one of each other, for each task and over all of them, for lanes and for ranks."""
    repeats = mixture_repeats([sum(blocks) for blocks in sizes], temperature)
    deal = Deal(plans(sizes, repeats), lanes=ranks * workers, seed=1)
    everyone = range(deal.lanes)
    counts = np.array([[len(deal.lane_pieces(t, epoch, lane)) for lane in everyone] for t in range(len(sizes))])
    of_ranks = counts.reshape(len(sizes), workers, ranks).sum(1)
    for values in (*counts, counts.sum(0), *of_ranks, of_ranks.sum(0)):
        assert np.ptp(values) <= 1


def test_a_place_in_other_data_is_refused(folders):
    stream = TrainStream(stream_settings(folders), 0, 1)
    saved = stream.saved_state([stream.state()])
    warmer = stream_settings(folders, temperature=2.0)
    for other in (stream_settings(folders[:1]), stream_settings(folders, seed=4), warmer):
        with pytest.raises(ConfigError, match=r"other shards, another run.seed"):
            TrainStream(other, 0, 1, saved)


def test_evaluation_counts_each_structure_once(folders):
    reader = SplitReader(stream_settings(folders), "val")
    names = [n for rank in range(3) for b in evaluation_batches(reader, rank, 3) for n in ids(b)]
    assert len(names) == len(set(names)) == sum(read_manifest(folder).structures("val") for folder in folders)


def test_batches_have_a_fixed_size_and_true_masks(folders):
    options = stream_settings(folders)
    sizes = set()
    for batch in islice(TrainStream(options, 0, 1), 30):
        sizes.add((batch.task.shape[0], *batch.positions.shape, *batch.neighbours.shape))
        assert batch.atom_mask.sum() == batch.n_atoms.sum() <= options.shape.atoms
        assert batch.structure_mask.sum() == len(ids(batch))
        flat, reverse = batch.slot_mask.reshape(-1), batch.reverse.reshape(-1)
        assert (reverse[reverse] == torch.arange(flat.numel())).all()
        receiver = batch.row_atom.repeat_interleave(ROW_SLOTS)
        assert (batch.neighbours.reshape(-1)[reverse] == receiver).all()
        pair = batch.positions[batch.neighbours] + batch.shifts - batch.positions[batch.row_atom][:, None]
        distance = pair.norm(dim=-1)
        assert (distance[batch.slot_mask] <= 4.0 + 1e-5).all() and (distance[~batch.slot_mask] == 0).all()
        assert (batch.structure[batch.row_atom][:, None] == batch.structure[batch.neighbours])[batch.slot_mask].all()
    assert sizes == {(8, 48, 3, 48 * 48 // ROW_SLOTS, ROW_SLOTS)}


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, False)])
def test_neighbours_are_those_of_ase(pbc):
    atoms = rattled_crystal(1)
    atoms.pbc = pbc
    i, j, vectors = neighbor_list("ijD", atoms, 4.0)
    pairs = half_pairs(atoms.positions, atoms.cell[:], atoms.pbc, 4.0)
    ours = lay_out([pairs])
    vector = atoms.positions[ours.sender] + ours.shift - atoms.positions[ours.receiver]

    def rows(*columns: np.ndarray) -> list[tuple[float, ...]]:
        return sorted(map(tuple, np.round(np.column_stack(columns), 6) + 0.0))

    assert rows(ours.receiver, ours.sender, vector) == rows(i, j, vectors)
    np.testing.assert_array_equal(pairs.degrees, np.bincount(i, minlength=len(atoms)))
    np.testing.assert_array_equal(ours.row_atom[ours.slot // ROW_SLOTS], ours.receiver)
    at = {int(slot): pair for pair, slot in enumerate(ours.slot)}
    assert len(at) == len(i)
    opposite = np.array([at[int(slot)] for slot in ours.reverse])
    np.testing.assert_array_equal(ours.receiver[opposite], ours.sender)
    np.testing.assert_allclose(vector[opposite], -vector, atol=1e-12)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["H2O", "CH4", "C6H6", "H2", "crystal"]), min_size=1, max_size=60), st.integers(1, 6))
def test_packing_loses_nothing_and_never_overfills(names, structures):
    shape = BatchShape(structures=structures, atoms=30, slots=30 * 48, edges=30 * 40)
    made = [
        to_structure(rattled_crystal() if n == "crystal" else rattled_molecule(n), f"{k}") for k, n in enumerate(names)
    ]
    samples = [graph_sample(structure, 0, 4.0) for structure in made]
    packed = list(pack(samples, shape))
    assert sorted(s.structure.source_id for batch in packed for s in batch) == sorted(s.source_id for s in made)
    for batch in packed:
        assert len(batch) <= structures and sum(len(s.structure) for s in batch) <= shape.atoms
        assert sum(s.rows for s in batch) <= shape.rows and sum(s.edges for s in batch) <= shape.edges


def test_nothing_waits_for_ever():
    """A stream of small molecules with one awkward crystal: it is in one of the next few batches."""
    crystal = graph_sample(to_structure(rattled_crystal(), "crystal"), 0, 4.0)
    water = graph_sample(to_structure(rattled_molecule("H2O"), "water"), 0, 4.0)
    packer = Packer(BatchShape(structures=16, atoms=len(crystal.structure) + 4, slots=(crystal.rows + 2) * ROW_SLOTS))
    batches_before = 0
    for sample in [water] * 40 + [crystal] + [water] * 400:
        packer.add(sample)
        packed = packer.pop_full()
        if packed and crystal in packed:
            break
        batches_before += packed is not None
    assert packed and crystal in packed and batches_before < 20


def test_a_structure_too_large_for_any_batch_is_named():
    sample = graph_sample(to_structure(rattled_crystal(), "big.xyz#4"), 0, 4.0)
    with pytest.raises(StructureError, match=r"big.xyz#4 has 8 atoms.* set batch.atoms to at least 8\.$"):
        Packer(BatchShape(structures=4, atoms=7, slots=10_000)).add(sample)
    with pytest.raises(StructureError, match=r"set batch.slots to at least \d+ and batch.edges to at least \d+\.$"):
        Packer(BatchShape(structures=4, atoms=9, slots=8, edges=2)).add(sample)


def test_reading_from_shards_gives_what_was_written(folders):
    reader = SplitReader(stream_settings(folders), "train")
    sample = reader.sample(1, 0, 3)
    assert (
        sample.task == 1
        and sample.structure.pbc.all()
        and Path(sample.structure.source_id).suffix.startswith(".extxyz")
    )


@pytest.mark.parametrize("stuck", [False, True])
def test_a_process_that_still_holds_a_stream_ends(folders, stuck):
    """Python asks readers to end by SIGTERM and waits, also for one that reads from where nothing comes any more."""
    script = f"""
import sys, time
from itertools import islice
from hydrazero.shards.stream import stream
from hydrazero.shards.graphs.graph import BatchShape

def first_alone(*arguments, batches=stream.lane_batches):
    yield from islice(batches(*arguments), 1)
    time.sleep(1000)

if {stuck}:
    stream.lane_batches = first_alone
shape = BatchShape(structures=8, atoms=48, slots=2304)
options = stream.StreamSettings(folders=tuple(sys.argv[1:]), cutoff=4.0, shape=shape, workers=2)
walk = iter(stream.TrainStream(options, 0, 1))
sys.held = walk
print(len(next(walk).task))
"""
    command = [sys.executable, "-c", script, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "8" and "Traceback" not in done.stderr
