"""`hydrazero init`: the run file that it writes trains unchanged, explains itself, and suits the time that there is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sources import make_shards, metals, molecules

from hydrazero.launch.cli.main import main
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.propose import propose_run
from hydrazero.trainer.propose.run_length import (
    COMPILE_FROM,
    MOST_EPOCHS,
    PATIENCE,
    RunLength,
    run_length,
    structures_in,
)
from hydrazero.trainer.rehearsal.measure_steps import StepTimes

TIMES = StepTimes(eager=0.5, compiled=0.1, compiling=100.0, validation=0.2, structures=16.0, parameters=1000)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return make_shards(folder, "molecules", molecules(60)), make_shards(folder, "metals", metals(40))


@pytest.mark.ranks
def test_what_it_writes_trains_unchanged(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = command("init", *data, "--out", "first.toml", "--size", "tiny", "--hours", 0.05, "--ranks", 2)
    assert made.exit_code == 0, made.output
    assert made.output.endswith("train with: hydrazero train first.toml --ranks 2\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.toml"]
    config, text = load_run_config("first.toml"), Path("first.toml").read_text()
    assert [task.name for task in config.tasks] == ["molecules", "metals"] and config.run.out == "first"
    assert config.train.steps > 10 and config.batch.edges > 0 and not config.train.compile
    assert config.loss.stress_weight and "labels: energy, forces, stress." in text
    lines = text.splitlines()
    assert all(len(line) <= 100 for line in lines if not line.startswith("shards"))
    trained = command("train", "first.toml", "--set", "train.steps=3")
    assert trained.exit_code == 0 and "trained: first" in trained.output, trained.output
    assert command("init", *data, "--out", "first.toml").exit_code == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("{molecules}", "--out", "there.toml"), "there.toml exists"),
        (("{molecules}", "--out", "run"), "must end with .toml"),
        (("{molecules}", "--out", "there.toml/run.toml"), "there.toml is no folder"),
        (("{molecules}", "--out", "absent/run.toml", "--hours", "0"), "--hours is 0"),
        (("{molecules}", "{molecules}", "--out", "run.toml"), "hold a task 'molecules'"),
        ((".", "--out", "run.toml"), "manifest.json"),
        (("{molecules}", "--out", "run.toml", "--hours", "0"), "--hours is 0"),
        (("{molecules}", "--out", "run.toml", "--hours", "nan"), "--hours is nan"),
        (("{molecules}", "--out", "run.toml", "--encoder", "pain"), "did you mean 'painn'"),
        (("{molecules}", "--out", "run.toml", "--size", "huge"), "size 'huge'"),
        (("{molecules}", "--out", "run.toml", "--cutoff", "7"), "degree_cutoffs = [7]"),
        (("{molecules}", "--out", "run.toml", "--cutoff", "-1"), "--cutoff is -1"),
    ],
)
def test_refusals(data, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("there.toml").write_text("")
    result = command("init", *(word.format(molecules=data[0], metals=data[1]) for word in arguments))
    assert result.exit_code == 1 and words in result.stderr and result.stderr.count("\n") == 1, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["there.toml"]


@pytest.fixture
def measured(tmp_path, monkeypatch) -> dict[tuple[int, int | None], float]:
    """Take the seconds of a step by ranks and threads from this table instead of measuring, on four cores."""
    seconds: dict[tuple[int, int | None], float] = {}

    def made(proposal) -> StepTimes:
        of_step = seconds[proposal.ranks, proposal.threads]
        return replace(TIMES, eager=2 * of_step, compiled=of_step, structures=float(proposal.batch.structures))

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(propose_run, "_measure", made)
    return seconds


@pytest.mark.parametrize("fastest", [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_threads_are_those_of_the_fastest_steps(data, measured, fastest):
    measured.update({(1, 4): 0.1, (2, 2): 0.1, (4, 1): 0.1})
    measured[fastest] = 0.05
    made = command("init", data[0], "--out", "run.toml")
    tried = "1 rank of 4 threads and 2 ranks of 2 threads and 4 ranks of 1 thread on 4 CPU cores"
    assert made.exit_code == 0 and f"measuring training steps with {tried}" in made.output, made.output
    train = f"hydrazero train run.toml --ranks {fastest[0]} --threads {fastest[1]}"
    text = Path("run.toml").read_text()
    assert made.output.endswith(f"train with: {train}\n") and f"#     {train}\n" in text
    assert f"With {fastest[0]} rank" in text and "structures/s with 2 ranks of 2 threads" in text.replace("\n# ", " ")
    assert load_run_config("run.toml").batch.structures


def test_what_the_user_has_set_is_not_measured_against_other_numbers(data, measured, monkeypatch):
    measured.update({(3, None): 0.1, (4, None): 0.1})
    made = command("init", data[0], "--out", "asked.toml", "--ranks", 3)
    assert made.output.endswith("train with: hydrazero train asked.toml --ranks 3\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert command("init", data[0], "--out", "set.toml").output.endswith("train set.toml --ranks 4\n")


@pytest.mark.parametrize(
    ("cores", "train", "layouts"),
    [
        (1, 1000, [(1, None)]),
        (2, 1000, [(1, 2), (2, 1)]),
        (5, 1000, [(1, 5), (2, 2), (4, 1)]),
        (7, 1000, [(1, 7), (2, 3), (4, 1)]),
        (11, 1000, [(1, 11), (2, 5), (4, 2)]),
        (11, 31, [(1, 11), (2, 5)]),
        (11, 15, [(1, None)]),
        (11, 3, [(1, None)]),
    ],
)
def test_ranks_share_any_number_of_cores(data, monkeypatch, cores, train, layouts):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert tried(data, monkeypatch, cores, train) == layouts


@pytest.mark.parametrize(
    ("threads", "cores", "train", "ranks"),
    [
        ("1", 11, 1000, 4),
        ("4", 11, 1000, 2),
        ("4,2", 11, 1000, 2),
        ("6", 11, 1000, 1),
        ("16", 11, 1000, 1),
        ("1", 8, 20, 2),
    ],
)
def test_ranks_with_the_threads_that_are_set_fit_on_the_cores(data, monkeypatch, threads, cores, train, ranks):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert tried(data, monkeypatch, cores, train) == [(ranks, None)]


@pytest.mark.parametrize("threads", ["", "0", "-1", "many"])
def test_threads_that_are_no_number_are_refused(data, monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS is '"):
        tried(data, monkeypatch, 4, 1000)


def tried(data, monkeypatch, cores: int, train: int) -> list[tuple[int, int | None]]:
    monkeypatch.setattr(propose_run, "gpu_module", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    request = propose_run.InitRequest(
        folders=data[:1], out=Path("run.toml"), encoder="painn", size="tiny", cutoff=5.0, hours=1.0, ranks=None
    )
    return propose_run._layouts(request, train)


def test_ranks_are_compared_by_the_structures_that_fit_into_the_hours():
    fast = replace(TIMES, compiled=0.05, compiling=3000.0)  # twice as fast, once it is compiled
    for hours, wins in ((1.0, False), (10.0, True)):
        slow, quick = (structures_in(hours=hours, ranks=2, val=100, times=times) for times in (TIMES, fast))
        assert (quick > slow) == wins
    assert structures_in(hours=1.0, ranks=1, val=0, times=TIMES) == int((3600 - 100) / 0.1) * 16


def length(hours: float = 1.0, train: int = 10_000, val: int = 100, times: StepTimes | None = TIMES) -> RunLength:
    return run_length(hours=hours, ranks=2, train=train, val=val, times=times)


def test_steps_fill_the_hours():
    # 3600 s less 20 evaluations of 4 batches, less the compiler's time.
    assert length().steps == int((3600 - 20 * 4 * 0.2 - 100) / 0.1) // 1000 * 1000 == 34_000
    assert length().compile and length().every == 1700
    slow = length(times=replace(TIMES, validation=600.0))  # a fifth of the time for evaluations, but at least one
    assert slow.every == slow.steps


def test_steps_are_compiled_where_that_pays():
    assert not length(times=replace(TIMES, compiled=0.49)).compile
    assert not length(times=replace(TIMES, compiled=None)).compile
    brief = COMPILE_FROM / 3600 - 0.01
    assert not length(hours=brief, times=None).compile and length(hours=1.0, times=None).compile


def test_few_structures_are_not_trained_for_ever():
    few = length(train=50, val=10)
    assert few.steps == MOST_EPOCHS * 50 // 32 // 100 * 100 and few.patience == PATIENCE and few.keep_best
    assert "1 hour would allow" in few.why_steps
    none = length(train=50, val=0)
    assert not none.keep_best and none.patience == 0 and "no validation structures" in none.why_best
    assert length(val=100).patience == PATIENCE and length(train=10**6).patience == 0


def test_hours_that_are_too_short():
    with pytest.raises(ConfigError, match=r"one training step takes 0\.5 s here"):
        length(hours=1e-5, times=replace(TIMES, compiled=None))
