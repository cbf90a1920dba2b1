"""Plans of large runs: the model's arithmetic, what real ranks hold and send beside it, and plans that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_processes import run_ranks

from hydrazero.launch.collectives import Links, cost
from hydrazero.launch.die_memory import die_memory
from hydrazero.launch.planned_data import TaskData, copying_seconds, reading
from hydrazero.launch.site_file import Measure, load_site, site_names
from hydrazero.launch.traffic import ALL_GATHER, ALL_REDUCE, Message, Run, padded, step_messages
from hydrazero.trainer.cli import main
from hydrazero.trainer.step_cost import ModelSize

EXASCALE = Path(__file__).parents[1] / "launch" / "runs" / "exascale.toml"
LINKS = Links(
    nodes=64, dies=8, node_latency=2e-6, node_bandwidth=5e10, network_latency=4e-6, network_bandwidth=1.25e10
)


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
@settings(max_examples=30, deadline=None)
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
@settings(max_examples=30, deadline=None)
def test_zero_divides_what_it_says(ranks):
    whole, *divided = (
        die_memory(run_of(stage), ranks, activations=0.0, gpu=False, workers=0) for stage in range(4)
    )
    for held in divided:
        assert held.optimizer == pytest.approx(whole.optimizer / ranks)
        assert held.average == pytest.approx(whole.average / ranks)
    assert divided[2].weights == pytest.approx(2 * whole.weights / ranks)  # those of the model and the optimizer's
    assert divided[0].weights == pytest.approx(whole.weights * (1 + 1 / ranks))


def test_bytes_of_weights_gradients_and_optimizer():
    """Of 1,000 parameters with Adam, two ranks; without ZeRO weights, gradients, a flat copy, moments, average."""
    held = [die_memory(run_of(n, 1000), 2, activations=0.0, gpu=False, workers=0).states for n in range(4)]
    assert held == [24_000, 18_000, 18_000, 24_000]


@given(size=st.floats(1, 1e10), nodes=st.sampled_from([1, 2, 64, 2048]), dies=st.sampled_from([1, 2, 8]))
@settings(max_examples=50, deadline=None)
def test_collectives_keep_the_bandwidth_and_trees_the_latency(size, nodes, dies):
    links = replace(LINKS, nodes=nodes, dies=dies)
    summed, gathered = (
        cost(Message(kind=kind, of="", bytes=size, count=1), links) for kind in (ALL_REDUCE, ALL_GATHER)
    )
    assert summed.node_bytes == pytest.approx(2 * gathered.node_bytes)
    assert dies * summed.network_bytes == pytest.approx(2 * size * (nodes - 1) / nodes)
    assert (summed.seconds > 0) == (nodes * dies > 1)
    more = cost(Message(kind=ALL_REDUCE, of="", bytes=2 * size, count=1), links)
    assert summed.seconds <= more.seconds <= 2 * summed.seconds + 1e-12
    if nodes == 2048 and size < 1e6:
        assert summed.algorithm == "tree" and gathered.seconds > 10 * summed.seconds  # a gather is a ring alone


def test_more_lanes_cut_blocks_and_read_them_more_often():
    data = [TaskData(name="a", structures=1_000_000, in_all=1_250_000, atoms=20.0, source="")]
    few, many = (reading(data, 1.0, lanes) for lanes in (4, 65_536))
    assert few.structures == many.structures == 1_000_000
    assert few.bytes == pytest.approx(data[0].bytes) and many.bytes > 50 * few.bytes


def test_copies_take_as_long_as_the_slowest_of_bandwidth_opens_and_disks():
    """Every node copies all splits at the same time as all others."""
    (data,) = [TaskData(name="a", structures=1_000_000, in_all=1_250_000, atoms=20.0, source="")]
    files = load_site("frontier").files
    size, count = data.bytes_in_all, data.shards * 1.25
    assert size == pytest.approx(1.25 * data.bytes)
    assert files.node_local_write is not None
    assert copying_seconds([data], 1, files) == pytest.approx(size / files.node_local_write.value)
    assert copying_seconds([data], 9000, files) == pytest.approx(9000 * count / files.opens.value)
    slow = replace(files, bandwidth=Measure(value=1e9, source=""), node_local_write=None)
    assert copying_seconds([data], 9000, slow) == pytest.approx(9000 * size / 1e9)


@pytest.mark.ranks
def test_two_ranks_hold_and_send_what_is_planned(tmp_path):
    """Peak memory within 20%, bytes of the collectives within 5%."""
    names = ["zero1", "zero3"]
    run_ranks("memory_ranks.py", 2, [str(tmp_path / "found.json"), "384", "512", *names])
    for name, found in json.loads((tmp_path / "found.json").read_text()).items():
        assert found["planned"] == pytest.approx(found["peak"], rel=0.2), name
        assert sum(found["planned_sent"].values()) == pytest.approx(sum(found["sent"].values()), rel=0.05), name


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with round numbers in the place of measured ones."""
    rates = {"compiled_train_cu_atoms": 4000.0, "compiled_train_benzene_atoms": 8000.0}
    rates |= {"eager_train_cu_atoms": 1000.0, "eager_train_benzene_atoms": 2000.0}
    rates |= {"pipeline_molecules_per_s": 4000.0, "pipeline_metals_per_s": 2000.0}
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    path.write_text(json.dumps([{"name": name, "value": value} for name, value in rates.items()]))
    return path


def planned(*arguments: str):
    return CliRunner().invoke(main, ["plan", str(EXASCALE), *arguments])


def test_the_exascale_run_is_planned(bench, tmp_path):
    result = planned("--site", "frontier", "--nodes", "2048", "--bench", str(bench), "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert plan["site"]["ranks"] == 16_384 and plan["batch"]["structures_filled"] == 25
    assert len(plan["tasks"]) == 16 and plan["batch"]["global_batch"] == 409_600
    assert {row["stage"] for row in plan["memory"] if row["precision"] == "float32"} == {0, 1, 2, 3}
    assert plan["scaling"]["weak"][-1]["ranks"] == 16_384
    efficiencies = [row["efficiency"] for row in plan["scaling"]["weak"]]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[0] == 1.0
    assert plan["epoch"]["node_hours"] == pytest.approx(2048 * plan["epoch"]["hours"])
    assert all(row["source"] for row in plan["sources"].values())


def test_stages_precisions_and_places_of_ranks(bench, tmp_path):
    """ZeRO 3 has the pace of steps that are not compiled; a rank a node reaches the others over the network."""

    def plan(*arguments: str):
        result = planned("--site", "frontier", "--bench", str(bench), "--out", str(tmp_path), *arguments)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "plan.json").read_text())

    alone = plan("--nodes", "8", "--ranks-per-node", "1")
    compute = {row["stage"]: row["compute"] for row in alone["stages"]}
    assert compute[0] == compute[1] == compute[2] == pytest.approx(compute[3] / 4, rel=1e-6)
    of_fp64 = {row["stage"]: row["buffers"] for row in alone["memory"] if row["precision"] == "fp64"}
    assert of_fp64[1] == of_fp64[2]
    gradients = next(row for row in alone["messages"] if row["of"] == "gradients")
    assert gradients["node_bytes"] == 0 < gradients["network_bytes"]
    assert set(alone["heads"]) == {"everywhere"}  # 8 ranks cannot be 16 groups
    assert set(plan("--nodes", "2")["heads"]) == {"everywhere", "groups"}


def test_groups_of_heads_send_as_many_messages_of_weights_as_all_ranks_do(bench, tmp_path):
    result = planned(
        *("--site", "frontier", "--nodes", "2048", "--bench", str(bench), "--out", str(tmp_path)),
        *("--set", "deepspeed.config=zero1"),
    )
    assert result.exit_code == 0, result.output
    heads = json.loads((tmp_path / "plan.json").read_text())["heads"]
    # Each of the optimizer's two groups is gathered by itself, whose latency is nearly all.
    assert heads["groups"]["communication"] == pytest.approx(heads["everywhere"]["communication"], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--site", "frontir"], "'frontir' is not known (did you mean 'frontier'?)"),
        (["--site", "perlmutter", "--nodes", "5000"], "--nodes is 5000, but jobs of site perlmutter have at most 1536"),
        (["--site", "frontier", "--nodes", "8", "--hours", "9"], "gives jobs of 8 nodes at most 2 hours"),
        (
            ["--site", "frontier", "--global-batch", "500"],
            "no multiple of 8 ranks times 25 structures; nearest are 400 (2 batches of each rank) or 600 (3",
        ),
        (
            ["--site", "frontier", "--set", "batch.atoms=16000", "--set", "batch.slots=7360000"],
            "fits ([batch]), with",
        ),
        (["--site", "frontier", "--set", "deepspeed.config=zero1_tf32"], "no die.flops.tf32, which tf32 needs"),
        (["--site", "frontier", "--set", "plan.atoms.oc20=0"], "task 'oc20': shards/oc20 has no manifest yet; say"),
        (["--site", "frontier", "--set", "plan.atoms.oc21=70"], "plan: 'oc21' is no task of the run file"),
    ],
)
def test_plans_that_cannot_be_are_one_sentence(arguments, said, bench):
    result = planned("--bench", str(bench), *arguments)
    assert result.exit_code == 1 and result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert said in result.output


@pytest.mark.parametrize("name", site_names())
def test_every_number_of_a_site_says_where_it_is_from(name):
    site = load_site(name)
    for measure in (site.die.memory, *site.die.flops.values(), site.network.latency, site.files.opens):
        assert measure.value > 0 and measure.source
