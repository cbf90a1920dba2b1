"""Plans that are rejected, each with one sentence, which names the nearest plan that fits if there is one."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner
from plans import EXASCALE, plan, refused, write_bench, write_site

from hydrazero.launch.cli.main import main
from hydrazero.launch.job.site_file import load_site
from hydrazero.launch.plan.memory import check_device, node_memory
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.trainer.cost.device_memory import device_memory
from hydrazero.trainer.cost.step_cost import ModelSize
from hydrazero.trainer.cost.traffic import Run

DEVICE, NODE = "memory = {value = 6.4e10", "memory = {value = 5.12e11"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--site", "frontir"], "'frontir' is not known (did you mean 'frontier'?)"),
        (["--site", "perlmutter", "--nodes", "5000"], "--nodes is 5000, but jobs of site perlmutter have at most 1536"),
        (["--site", "frontier", "--nodes", "8", "--hours", "9"], "limits jobs with --nodes 8 to 2 hours"),
        (
            ["--site", "frontier", "--global-batch", "500"],
            "not a multiple of 8 ranks times 25 structures; the nearest are 400 (2 batches per rank) or 600 (3",
        ),
        (
            ["--site", "frontier", "--set", "batch.atoms=16000", "--set", "batch.slots=7360000"],
            "fits ([batch]), with",
        ),
        (["--site", "frontier", "--set", "deepspeed.config=zero1_tf32"], "no die.flops.tf32, which tf32 needs"),
        (["--site", "frontier", "--set", "plan.atoms.oc20=0"], "task 'oc20': shards/oc20 has no manifest yet; give"),
        (
            ["--site", "frontier", "--ranks-per-node", "9"],
            "--ranks-per-node is 9, but a node of site frontier has 8 devices, one for each rank; use at most 8",
        ),
        (["--site", "frontier", "--hours", "nan"], "--hours is nan; it must be a number of hours"),
        (["--site", "frontier", "--set", "batch.atoms=150"], "structures of task 'odac23' have 200 atoms on average"),
        (["--site", "frontier", "--set", "plan.atoms.oc20=-4"], "plan.atoms.oc20 is -4; it must be at least 0"),
        (["--site", "frontier", "--set", "plan.atoms.oc20=nan"], "plan.atoms.oc20 is nan; it must be a finite number"),
        (
            ["--site", "frontier", "--set", "plan.structures.oc20=-4"],
            "plan.structures.oc20 is -4; it must be at least 0",
        ),
        (["--site", "frontier", "--set", "model.features=65536"], "measuring the costs of a small step of it takes"),
        (
            ["--site", "frontier", "--set", "deepspeed.gradient_accumulation_steps=2.5"],
            "deepspeed.gradient_accumulation_steps is 2.5; it must be a whole number of at least 1.",
        ),
        (
            ["--site", "frontier", "--set", "deepspeed.zero_optimization.stage=5"],
            "deepspeed.zero_optimization.stage is 5; it must be 0, 1, 2 or 3.",
        ),
        (
            ["--site", "frontier", "--set", "deepspeed.zero_optimization.reduce_bucket_size=0"],
            "deepspeed.zero_optimization.reduce_bucket_size is 0; it must be at least 1.",
        ),
        (["--site", "frontier", "--global-batch", "7"], "the nearest is 200 (1 batch per rank)."),
        (["--site", "none.toml"], "site file none.toml cannot be read (No such file or directory)."),
        (["--site", "frontier", "--set", "plan.atoms.oc21=70"], "plan: 'oc21' is not a task of the run file"),
    ],
)
def test_rejected_plans_are_one_sentence(arguments, said, tmp_path):
    assert said in refused("--bench", write_bench(tmp_path), *arguments)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ('"rign"', "site frontier: collectives.ways: algorithm 'rign' is not known (did you mean 'ring'?)"),
        ('"tree"', "site frontier: collectives.ways has no algorithm that can gather; add a ring."),
    ],
)
def test_faulty_algorithms_of_collectives(new, said, tmp_path):
    assert refused("--site", write_site(tmp_path, ('"ring"', new))).startswith(f"Error: {said}")


def test_copies_that_take_longer_than_a_job(tmp_path):
    asked = ("--site", "frontier", "--nodes", 2048, "--hours", 0.25, "--out", tmp_path)
    result = CliRunner().invoke(main, ["plan", str(EXASCALE), *map(str, asked)])
    assert result.exit_code == 1 and "h, but a job lasts 0.25 h; request more --hours" in result.output, result.output


def test_a_run_file_that_is_missing():
    result = CliRunner().invoke(main, ["plan", "none.toml", "--site", "frontier"])
    assert result.output == "Error: run file none.toml cannot be read (No such file or directory).\n"


def test_a_tenth_of_a_device_is_left_free_and_the_batch_that_is_named_fits(tmp_path):
    whole = plan(tmp_path)["memory"][0]["total"]
    tight = write_site(tmp_path, (DEVICE, f"memory = {{value = {1.05 * whole}"))
    said = refused("--site", tight)
    assert f"has {1.05 * whole / 1e9:.3g} GB, of which a run may use {0.945 * whole / 1e9:.3g} GB, but this" in said
    batch = [f"batch.{key}={value}" for key, value in re.findall(r"(structures|atoms|slots|edges) = (\d+)", said)]
    document = plan(tmp_path, tight, 1, 0, *batch)
    (own,) = (row for row in document["memory"] if row["own"])
    room = document["memory_of_die"]["room"]
    assert own["fits"] and 0.99 * room < own["total"] <= room < document["memory_of_die"]["bytes"]
    assert plan(tmp_path, write_site(tmp_path, (DEVICE, f"memory = {{value = {1.12 * whole}")))
    tiny = write_site(tmp_path, (DEVICE, "memory = {value = 3e8"))
    assert "does not hold a structure of 200 atoms: use a smaller" in refused("--site", tiny)


def test_a_zero_stage_that_fits_comes_before_a_smaller_batch():
    rows = [
        {"stage": n, "precision": "float32", "own": n == 1, "total": total, "fits": total < 57.6e9, "activations": 3e10}
        for n, total in ((1, 6.1e10), (2, 6e10), (3, 5e10))
    ]
    with pytest.raises(ConfigError, match=r"needs 61 GB; with ZeRO 3 it needs 50 GB and fits\."):
        check_device(load_site("frontier"), rows, BatchShape(structures=1, atoms=100, slots=800), 1, 20.0)


def test_main_memory_of_a_node_is_checked_and_the_plan_that_is_named_fits(tmp_path):
    whole = plan(tmp_path)["memory_of_node"]
    parts = {key: value for key, value in whole.items() if key not in ("total", "bytes", "room")}
    assert whole["total"] == pytest.approx(sum(parts.values())) and parts["processes"] == 8 * (5 * 0.5e9 + 1e9)
    for share, said, ranks, changes in (
        (0.9, "data.workers = 3", 0, ["data.workers=3"]),
        (0.2, "--ranks-per-node 1", 1, []),
    ):
        tight = write_site(tmp_path, (NODE, f"memory = {{value = {share * whole['total'] / 0.9}"))
        taken = f"8 ranks with 4 workers each need {whole['total'] / 1e9:.3g} GB; with {said} they"
        assert taken in refused("--site", tight)
        assert plan(tmp_path, tight, 1, ranks, *changes)
    tiny = write_site(tmp_path, (NODE, "memory = {value = 2e9"))
    assert "and a single rank with as many does not fit either" in refused("--site", tiny)


def test_states_that_are_offloaded_go_into_the_main_memory_page_locked():
    offloaded = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    run = Run(
        size=ModelSize(encoder_groups=(1_000_000,), head_groups=(0,)),
        ds_config={"zero_optimization": offloaded, "optimizer": {"type": "AdamW"}},
        tasks=1,
        quantities=3,
        features=64,
        balance_every=0,
        average=True,
    )
    held = device_memory(run, 8, activations=0.0, gpu=True, workers=2)
    node = node_memory(held, [], ranks=8, workers=2, gpu=True)
    # The optimizer's weights, two moments of AdamW and the average, in four bytes each.
    assert node.offloaded == 2 * 16e6
    assert node.stream == 8 * 2 * 100e6 and node.dies == 0


def test_ranks_on_cpu_cores_take_all_their_memory_from_the_node(tmp_path):
    document = plan(tmp_path, "local", 1, 0, "batch.atoms=400", "batch.slots=18400", "batch.edges=16000")
    own = next(row for row in document["memory"] if row["own"])
    assert document["memory_of_node"]["dies"] == pytest.approx(2 * own["total"])
    assert document["memory_of_node"]["stream"] == document["memory_of_node"]["offloaded"] == 0
