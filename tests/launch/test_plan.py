"""Plans of large runs: formulas, collective operations, data, and complete plans of the exascale run file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import EXASCALE, plan, planned, refused, write_bench

from hydrazero.launch.job.site_file import AlgorithmSection, Measure, load_site, site_names
from hydrazero.launch.plan.collectives import Links, check_algorithms, cost, links_of
from hydrazero.launch.plan.data import TaskData, copying_seconds, epoch_reads, mean_atoms
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.cost.device_memory import device_memory
from hydrazero.trainer.cost.step_cost import ModelSize
from hydrazero.trainer.cost.traffic import ALL_GATHER, ALL_REDUCE, Message, Run, padded, step_messages

FRONTIER = load_site("frontier")


def way(
    algorithm: str, start: float = 0.0, node: float = 0.0, network: float = 0.0, share: float = 1.0
) -> AlgorithmSection:
    return AlgorithmSection(
        algorithm=algorithm, start=start, node_step=node, network_step=network, bandwidth_share=share, source="here"
    )


def links(nodes: int, per_node: int, *algorithms: AlgorithmSection) -> Links:
    return Links(
        nodes=nodes, ranks_per_node=per_node, node_bandwidth=5e10, network_bandwidth=1.25e10, algorithms=algorithms
    )


def message(kind: str, size: float) -> Message:
    return Message(kind=kind, of="", bytes=size, count=1)


def run_of(stage: int, parameters: int = 1_000_000, micro_batches: int = 1, **precision: dict) -> Run:
    return Run(
        size=ModelSize(encoder_groups=(parameters // 2 - 500, 500), head_groups=(parameters // 2 - 500, 500)),
        ds_config={
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000},
            "gradient_accumulation_steps": micro_batches,
            "optimizer": {"type": "AdamW"},
            **precision,
        },
        tasks=16,
        quantities=3,
        features=64,
        balance_every=50,
        average=True,
    )


def sent(run: Run, ranks: int) -> float:
    return sum(message.total for message in step_messages(run, ranks))


@given(
    ranks=st.integers(2, 20_000),
    parameters=st.integers(50_000, 5_000_000).map(lambda half: 2 * half),
    micro=st.integers(1, 8),
)
@settings(max_examples=30)
def test_traffic_grows_with_the_model_and_from_stage_to_stage(ranks, parameters, micro):
    by_stage = [sent(run_of(stage, parameters, micro), ranks) for stage in range(4)]
    own = sum(m.total for m in step_messages(run_of(0, parameters), ranks) if m.of != "gradients")
    assert by_stage[0] - own == pytest.approx(4 * parameters)  # once, whatever is accumulated
    assert by_stage[0] < by_stage[1] <= by_stage[2]
    if micro > 1:  # ZeRO 2 and 3 send for every micro-batch
        assert by_stage[1] < by_stage[2]
        assert sent(run_of(3, parameters, 2 * micro), ranks) - own > 1.9 * (by_stage[3] - own)
    half = sent(run_of(1, parameters, micro, bf16={"enabled": True}), ranks)
    assert half < by_stage[1]  # weights are gathered in two bytes, gradients still summed in four
    assert step_messages(run_of(1), 1) == []
    assert 0 <= padded(parameters, ranks) - parameters < ranks


@given(ranks=st.integers(2, 20_000))
@settings(max_examples=30)
def test_zero_divides_the_states_among_ranks(ranks):
    whole, *divided = (device_memory(run_of(stage), ranks, activations=0.0, gpu=False, workers=0) for stage in range(4))
    for held in divided:
        assert held.optimizer == pytest.approx(whole.optimizer / ranks)
        assert held.average == pytest.approx(whole.average / ranks)
    assert divided[2].weights == pytest.approx(2 * whole.weights / ranks)  # those of the model and the optimizer's
    assert divided[0].weights == pytest.approx(whole.weights * (1 + 1 / ranks))


def test_bytes_of_weights_gradients_and_optimizer():
    """1,000 parameters with Adam on two ranks; without ZeRO: weights, gradients, a flat copy, moments and average."""
    held = [device_memory(run_of(n, 1000), 2, activations=0.0, gpu=False, workers=0).states for n in range(4)]
    assert held == [24_000, 18_000, 18_000, 24_000]


@given(size=st.floats(1, 1e10), nodes=st.sampled_from([1, 2, 3, 64, 2048]), per_node=st.sampled_from([1, 2, 8]))
@settings(max_examples=50)
def test_collectives_keep_the_bandwidth(size, nodes, per_node):
    joined = replace(links_of(FRONTIER, 8 * nodes), ranks_per_node=per_node)
    summed, gathered = (cost(message(kind, size), joined) for kind in (ALL_REDUCE, ALL_GATHER))
    assert (summed.seconds > 0) == (nodes * per_node > 1)
    more = cost(message(ALL_REDUCE, 2 * size), joined)
    assert summed.seconds <= more.seconds <= 2 * summed.seconds + 1e-12
    every = 2 * size * (nodes * per_node - 1)  # that have to be sent by all ranks together, at least
    sent = nodes * per_node * (summed.node_bytes + summed.network_bytes)
    assert every - 1e-6 <= sent * (1 + 1e-9) and sent <= every + 2 * size + 1e-6
    assert nodes * per_node * (gathered.node_bytes + gathered.network_bytes) == pytest.approx(every / 2)
    if nodes == 2048 and size < 1e6:
        assert summed.algorithm == "tree, LL" and gathered.seconds > 10 * summed.seconds  # a gather is a ring alone


@pytest.mark.parametrize(
    ("algorithm", "nodes", "per_node", "in_node", "between"),
    [
        ("ring", 1, 8, 14, 0),  # 2 (p - 1), all of them here
        ("ring", 64, 8, 2 * (512 - 64), 2 * 63),
        ("ring", 64, 1, 0, 126),
        ("tree", 64, 8, 14, 12),  # twice the chain of a node and the logarithm of 64
        ("tree", 65, 8, 14, 14),
        ("tree", 1, 8, 14, 0),
        ("hierarchical_ring", 64, 8, 14, 126),
        ("hierarchical_rabenseifner", 64, 8, 14, 12),
    ],
)
def test_the_steps_of_an_all_reduce_follow_from_its_algorithm(algorithm, nodes, per_node, in_node, between):
    started, stepped, crossed = (
        cost(message(ALL_REDUCE, 0.0), links(nodes, per_node, way(algorithm, *numbers))).seconds
        for numbers in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    )
    assert (started, stepped, crossed) == (1.0, in_node, between)
    if algorithm in ("ring", "hierarchical_ring"):
        gathered = cost(message(ALL_GATHER, 0.0), links(nodes, per_node, way(algorithm, 0.0, 1.0, 1.0))).seconds
        assert gathered == (in_node + between) / 2


def test_bandwidth_is_that_of_the_slower_link_or_of_one_link_after_the_other():
    """8 MB on 2 nodes of 4: rings and trees are pipelined; hierarchical algorithms do one level after the other."""
    seconds = {
        name: cost(message(ALL_REDUCE, 8e6), links(2, 4, way(name, share=share))).seconds
        for name, share in (("ring", 1.0), ("tree", 0.5), ("hierarchical_ring", 1.0))
    }
    assert seconds["ring"] == pytest.approx(14e6 / 4 / 1.25e10)  # 2 S 7/8, a fourth of it by each device's card
    assert seconds["tree"] == pytest.approx(2 * 16e6 / 4 / 1.25e10)
    assert seconds["hierarchical_ring"] == pytest.approx(12e6 / 5e10 + 2e6 / 1.25e10)


def test_the_fastest_algorithm_of_the_library_is_used():
    """RCCL on Frontier uses trees for sums over many nodes, LL for small messages and Simple for large ones."""
    for nodes, kind, size, said in (
        (2048, ALL_REDUCE, 1e3, "tree, LL"),
        (2048, ALL_REDUCE, 3e7, "tree, Simple"),
        (2048, ALL_GATHER, 3e7, "ring, LL"),
        (2, ALL_GATHER, 3e8, "ring, Simple"),
    ):
        assert cost(message(kind, size), links_of(FRONTIER, 8 * nodes)).algorithm == said
    aurora = links_of(load_site("aurora"), 12 * 64)
    assert cost(message(ALL_REDUCE, 3e7), aurora).algorithm == "hierarchical rabenseifner"
    assert cost(message(ALL_GATHER, 3e7), aurora).algorithm == "hierarchical ring"


def test_tasks_with_a_share_are_drawn_by_it():
    data = [
        TaskData(name="a", structures=1000, in_all=1000, atoms=10.0, source=""),
        TaskData(name="b", structures=1000, in_all=1000, atoms=30.0, source=""),
    ]
    assert mean_atoms(data, 1.0, ()) == pytest.approx(20.0)
    assert mean_atoms(data, 1.0, (0.25, None)) == pytest.approx(0.25 * 10 + 0.75 * 30)


def test_more_lanes_cut_blocks_and_read_them_more_often():
    data = [TaskData(name="a", structures=1_000_000, in_all=1_250_000, atoms=20.0, source="")]
    config = load_run_config(EXASCALE)
    few, many = (epoch_reads(data, config.data.temperature, config.shares, lanes) for lanes in (4, 65_536))
    assert few.structures == many.structures == 1_000_000
    assert few.bytes == pytest.approx(data[0].bytes) and many.bytes > 50 * few.bytes


def test_copies_take_as_long_as_the_slowest_of_bandwidth_opens_and_disks():
    """Every node copies all splits at the same time as all other nodes."""
    (data,) = [TaskData(name="a", structures=1_000_000, in_all=1_250_000, atoms=20.0, source="")]
    files = load_site("frontier").files
    size, count = data.bytes_in_all, data.shards * 1.25
    assert size == pytest.approx(1.25 * data.bytes)
    assert files.node_local_write is not None
    assert copying_seconds([data], 1, files) == pytest.approx(size / files.node_local_write.value)
    assert copying_seconds([data], 9000, files) == pytest.approx(9000 * count / files.opens.value)
    slow = files.model_copy(update={"bandwidth": Measure(value=1e9, source=""), "node_local_write": None})
    assert copying_seconds([data], 9000, slow) == pytest.approx(9000 * size / 1e9)


def test_the_exascale_run_is_planned(tmp_path):
    options = ("--site", "frontier", "--nodes", 2048, "--bench", write_bench(tmp_path), "--out", tmp_path)
    result = planned(*options)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "plan.json").read_text())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert document["site"]["ranks"] == 16_384 and document["batch"]["structures_filled"] == 25
    assert len(document["tasks"]) == 16 and document["batch"]["global_batch"] == 409_600
    assert {row["stage"] for row in document["memory"] if row["precision"] == "float32"} == {0, 1, 2, 3}
    assert document["scaling"]["weak"][-1]["ranks"] == 16_384
    efficiencies = [row["efficiency"] for row in document["scaling"]["weak"]]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[0] == 1.0
    assert document["epoch"]["node_hours"] == pytest.approx(2048 * document["epoch"]["hours"])
    epoch, copying = document["epoch"], document["files"]["seconds_of_copying"] / 3600
    assert copying > 0.1 and epoch["run_hours_with_copies"] == pytest.approx(epoch["run_hours"] + copying)
    assert epoch["run_node_hours"] == pytest.approx(2048 * epoch["run_hours_with_copies"])
    assert all(row["source"] for row in document["sources"].values())


def test_stages_precisions_and_places_of_ranks(tmp_path):
    """ZeRO 3 has the speed of eager steps; with one rank per node, all messages go over the network."""
    alone = plan(tmp_path, "frontier", 8, 1)
    compute = {row["stage"]: row["compute"] for row in alone["stages"]}
    assert compute[0] == compute[1] == compute[2] == pytest.approx(compute[3] / 4, rel=1e-6)
    of_fp64 = {row["stage"]: row["buffers"] for row in alone["memory"] if row["precision"] == "fp64"}
    assert of_fp64[1] == of_fp64[2]
    gradients = next(row for row in alone["messages"] if row["of"] == "gradients")
    assert gradients["node_bytes"] == 0 < gradients["network_bytes"]


def test_scaling_is_shown_up_to_the_size_of_the_site_and_at_the_plan_s_own_size(tmp_path):
    scaling = plan(tmp_path, "perlmutter", 3)["scaling"]  # of 1,536 nodes of four
    for kind in ("weak", "strong"):
        assert [row["ranks"] for row in scaling[kind]] == [1, 4, 12, 16, 64, 256, 1024, 4096]
    assert scaling["batches"] == 4096 and scaling["strong"][-1]["efficiency"] < 1


def test_rows_of_the_bench_are_required_only_if_a_file_is_named(tmp_path, monkeypatch):
    """`make bench-scaling` writes a file without them, and a fresh checkout has no file."""
    monkeypatch.chdir(tmp_path)
    options = ("--site", "frontier", "--out", tmp_path)
    (tmp_path / "runs").mkdir()

    def speed(*more: object) -> str:
        result = planned(*options, *more)
        assert result.exit_code == 0, result.output
        (line,) = (line for line in result.output.splitlines() if line.startswith(" speed "))
        return " ".join(line.split())

    bare = "speed 100% of the roofline ({}: the full roofline, which no step reaches)"
    assert speed() == bare.format("no runs/bench.json")
    document = json.loads((tmp_path / "plan.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert document["pace"]["atoms_of_worker"] is None and document["step"]["seconds"] > 0
    scaling = write_bench(tmp_path / "runs", {"zero1_over_ddp": 1.2})
    assert speed() == bare.format("runs/bench.json has no row compiled_train_cu_atoms")
    assert f"--bench {scaling} has no row compiled_train_cu_atoms" in refused(*options, "--bench", scaling)
    write_bench(tmp_path / "runs")
    assert speed().endswith("of the roofline (runs/bench.json: PaiNN of 128 features, compiled, on 2 cores)")
    assert speed() == speed("--bench", "runs/bench.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ('[{"name": "compiled_train_cu_atoms", "value": NaN}]', "compiled_train_cu_atoms is nan; create it again"),
        ('[{"name": "pipeline_metals_per_s", "value": 0}]', "pipeline_metals_per_s is 0; create it again"),
    ],
)
def test_benches_that_cannot_be_used(text, said, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(text)
    assert said in refused("--site", "frontier", "--bench", path)
    assert "cannot be read (No such file" in refused("--site", "frontier", "--bench", tmp_path / "none.json")


@pytest.mark.parametrize("name", site_names())
def test_every_number_of_a_site_has_a_source(name):
    site = load_site(name)
    for measure in (site.die.memory, *site.die.flops.values(), site.network.bandwidth, site.files.opens):
        assert measure.value > 0 and measure.source
    library = {"aurora": "oneCCL", "frontier": "RCCL", "local": "gloo"}.get(name, "NCCL")
    assert site.collectives.library == library
    check_algorithms(site)
    for each in site.collectives.ways:
        # The numbers are from the library itself or marked as an estimate.
        assert each.source.startswith((library, "estimate: ")) and 0 < each.bandwidth_share <= 1
        assert each.node_step >= 0 and each.network_step > 0
