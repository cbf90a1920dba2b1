"""Searches: spaces that are refused, halving, the objective, real campaigns of several workers, killed and gone on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner
from placed import make_split_shards
from results import search_page as results_page
from sources import labelled, metals, molecules

from hydrazero.launch.cli.main import main
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.config.tasks import task_manifests
from hydrazero.trainer.records.run_files import read_metrics
from hydrazero.trainer.report.search_page import write_search_page
from hydrazero.trainer.search.campaign import begin
from hydrazero.trainer.search.halving import is_promoted, pareto_front
from hydrazero.trainer.search.journal import JOURNAL_NAME, open_journal
from hydrazero.trainer.search.objective import relative_error, trivial_errors
from hydrazero.trainer.search.trial_rows import trial_rows
from hydrazero.trainer.search.trial_settings import ENDLESS, search_overrides, trial_overrides
from hydrazero.trainer.search.worker import SearchStoppedError, work

BIN = Path(sys.executable).parent
RUN = """
[run]
out = "{root}/best"
[[tasks]]
name = "molecules"
shards = "{root}/data/molecules"
[[tasks]]
name = "metals"
shards = "{root}/data/metals"
[model]
features = 8
layers = 1
radial_functions = 4
cutoff = 3.0
head_features = 4
[batch]
structures = 8
atoms = 48
slots = 1536
[data]
workers = 0
[train]
steps = 50
log_every = 1
average = 0.0
[deepspeed]
config = "zero0"
"""
SPACE = """
[search]
run = "{root}/run.toml"
out = "{root}/{out}"
seconds = {seconds}
rungs = {rungs}
reduction = 2
{more}
[vary]
{vary}
"""
VARY = """
"model.encoder" = ["painn", "schnet"]
"model.cutoff" = {low = 3, high = 4}
"batch.structures" = [4]
"deepspeed.optimizer.params.lr" = {low = 1e-3, high = 1e-2, log = true}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    make_split_shards(folder / "data", "molecules", train=molecules(32), val=molecules(8, seed=1))
    make_split_shards(folder / "data", "metals", train=metals(16), val=metals(4, seed=1))
    (folder / "run.toml").write_text(RUN.format(root=folder))
    return folder


def write_space(root: Path, out: str, vary: str = VARY, seconds: float = 0.4, more: str = "", rungs: int = 2) -> Path:
    path = root / f"{out}.toml"
    path.write_text(SPACE.format(root=root, out=out, vary=vary, seconds=seconds, more=more, rungs=rungs))
    return path


def search(*words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "hydrazero"), "search", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("vary", "more", "said"),
    [
        ('"model.featurs" = [8]', "", "'model.featurs' is no setting of a run file (did you mean 'model.features'?)"),
        ('"model.features" = {low = 16, high = 8}', "", "'model.features'.low is 16, which is above high, 8"),
        ('"model.features" = {low = 8, high = 8}', "", "low and high are both 8; put the value into"),
        ('"model.features" = {low = 8, high = 16, step = 3}', "", ".step is 3, with which values from low = 8 do not"),
        ('"model.features" = {low = 8, hihg = 16}', "", "'model.features'.hihg is not known (did you mean 'high'?)"),
        ('"model.features" = {low = 8.5, high = 16}', "", "model.features must be a whole number, not 8.5"),
        ('"model.features" = {low = 8, high = 16, step = 0}', "", ".step is 0; it must be above 0"),
        ('"model.features" = []', "", "'model.features' is an empty list"),
        ('"model.features" = 8', "", "'model.features' is 8; give a list of values, or a range"),
        ('"model.features" = [8, 8]', "", "'model.features' names 8 twice"),
        ('"loss.forces_weight" = {low = 0, high = 1, log = true}', "", ".low is 0, which has no logarithm"),
        ('"loss.forces_weight" = {low = nan, high = 1}', "", ".low is nan; it must be a finite number"),
        ('"loss.kind" = ["l1", "l3"]', "", "vary, 'loss.kind': "),
        ('"model.encoder" = ["painn", "shcnet"]', "", "(did you mean 'schnet'?)"),
        ('"train.steps" = [5, 6]', "", "'train.steps' cannot be varied: trials end at a time"),
        ('"deepspeed.scheduler.type" = ["a", "b"]', "", "the learning rate is constant after a warm-up"),
        ('"deepspeed.optimizer.params.lrr" = [1e-3, 1e-2]', "", "(did you mean 'deepspeed.optimizer.params.lr'?)"),
        ('"batch.slots" = [64, 128]', "", "it is worked out from batch.structures"),
        ('"tasks" = ["a"]', "", "all trials have the same tasks"),
        ('"model.cutoff" = [3.0, 4.0]', "", 'say for how many structures, as "batch.structures" = [16]'),
        ('"model.cutoff" = [3.0, 7.0]\n"batch.structures" = [4]', "", "no counts of neighbours within 7 Å"),
        ('"model.layers" = [1, 2]', "rate = 'infrence'", "rate 'infrence' is not known (did you mean 'inference'?)"),
        ('"model.layers" = [1, 2]', "ranks = 0", "search.ranks is 0; it must be at least 1"),
        ('"model.layers" = [1, 2]', "sead = 3", "search.sead is not known (did you mean 'seed'?)"),
        ("", "", "[vary] is missing or empty"),
    ],
)
def test_a_faulty_space_is_one_sentence_before_anything_starts(root, vary, more, said):
    path = write_space(root, "faulty", vary=vary, more=more)
    result = CliRunner().invoke(main, ["search", str(path), "--trials", "2"])
    assert result.exit_code == 1 and said in result.output, result.output
    assert result.output.startswith(f"Error: {path}: ") and result.output.count("\n") == 1
    assert not (root / "faulty").exists()


def test_a_run_file_at_fault_is_told_with_the_space_that_names_it(root, tmp_path):
    path = tmp_path / "space.toml"
    for run, said in ((tmp_path / "no.toml", "cannot be read"), (root / "other.toml", "has no shards")):
        (root / "other.toml").write_text(RUN.format(root=root).replace("data/metals", "data/wood"))
        section = f'[search]\nrun = "{run}"\nout = "{tmp_path}/out"\nseconds = 1\n'
        path.write_text(f'{section}[vary]\n"model.layers" = [1, 2]\n')
        result = CliRunner().invoke(main, ["search", str(path), "--trials", "2"])
        assert result.exit_code == 1 and result.output.startswith(f"Error: {path}: search.run: ")
        assert said in result.output and result.output.count("\n") == 1
    missing = (tmp_path / "no.toml", "--trials", "2")
    for words, said in ((missing, "cannot be read"), ((path, "--report"), "no search yet"), ((path,), "--trials N")):
        result = CliRunner().invoke(main, ["search", *map(str, words)])
        assert result.exit_code == 1 and said in result.output and result.output.count("\n") == 1


def test_one_in_so_many_goes_on():
    errors = [(0.9,), (0.5,), (0.7,), (0.3,), (0.8,), (0.2,)]
    # The first always does, then the best so far, then the best third of all.
    assert [is_promoted(errors[n], errors[:n], 3) for n in range(6)] == [True, True, False, True, False, True]
    assert is_promoted((0.25,), errors, 3) and not is_promoted((0.4,), errors, 3)
    # With two objectives whatever nothing else dominates does, and what few dominate.
    both = [(0.2, -10.0), (0.3, -30.0), (0.5, -50.0), (0.6, -20.0), (0.7, -40.0), (0.9, -5.0)]
    assert [is_promoted(both[n], both[:n] + both[n + 1 :], 3) for n in range(6)] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert pareto_front(both) == [0, 1, 2]


def test_the_trivial_predictor_has_the_error_one(root):
    config = load_run_config(root / "run.toml")
    trivial = trivial_errors(config.tasks, task_manifests(config), config.loss, skip_damaged=False)
    assert list(trivial) == ["molecules", "metals"] and all(set(e) == {"energy", "forces"} for e in trivial.values())
    forces = [abs(labelled(atoms).get_forces()).ravel() for atoms in metals(4, seed=1)]
    flat = [value for each in forces for value in each]
    assert trivial["metals"]["forces"] == pytest.approx(1000 * sum(flat) / len(flat), rel=1e-5)
    references = BlockReader(root / "data/molecules", "val").manifest.reference_energies
    frames = [labelled(atoms) for atoms in molecules(8, seed=1)]
    residuals = [
        abs(a.get_potential_energy() - sum(references[s] for s in a.get_chemical_symbols())) / len(a) for a in frames
    ]
    assert trivial["molecules"]["energy"] == pytest.approx(1000 * sum(residuals) / len(residuals), rel=1e-5)
    assert relative_error(trivial, trivial) == pytest.approx(1.0)
    # Forces of one task four times better, energies of it alike: a factor of 2 in that task, of sqrt(2) in both.
    found = {name: dict(errors) for name, errors in trivial.items()}
    found["metals"]["forces"] /= 4
    assert relative_error(found, trivial) == pytest.approx(1 / math.sqrt(2))
    found["metals"]["forces"] = math.nan
    assert math.isnan(relative_error(found, trivial))
    # A task without forces counts as much as one with both.
    energies = {"molecules": {"energy": trivial["molecules"]["energy"]}, "metals": trivial["metals"]}
    half = {"molecules": {"energy": trivial["molecules"]["energy"] / 4}, "metals": trivial["metals"]}
    assert relative_error(half, energies) == pytest.approx(0.5)


def test_values_become_a_run(root):
    run = root / "run.toml"
    lr = {"deepspeed.optimizer.params.lr": 1e-5, "deepspeed.scheduler.params.warmup_num_steps": 7}
    own = trial_overrides(run, {"model.encoder": "schnet", "model.cutoff": 3.5, "batch.structures": 4, **lr})
    base = load_run_config(run)
    ds = deepspeed_config(base.deepspeed, base.train.steps)
    config = load_run_config(run, [*search_overrides(ds, root / "out", 12.5), *own])
    assert (config.model.encoder, config.model.cutoff, config.train.budget_seconds) == ("schnet", 3.5, 12.5)
    assert config.train.steps == ENDLESS and config.batch.atoms < 48 and 0 < config.batch.edges < 1536
    ds = deepspeed_config(config.deepspeed, config.train.steps)
    assert ds["optimizer"]["params"]["lr"] == 1e-5 and ds["optimizer"]["params"]["weight_decay"] == 1e-4
    assert ds["scheduler"]["type"] == "WarmupStableDecayLR"
    assert ds["scheduler"]["params"] | {"total_num_steps": 0} == {
        "warmup_num_steps": 7,
        "decay_share": 0,
        "total_num_steps": 0,
    }
    # The run of its own keeps steps and schedule of the run file.
    alone = load_run_config(run, own)
    assert alone.train.steps == 50
    assert deepspeed_config(alone.deepspeed, 50)["scheduler"]["type"] == "WarmupCosineLR"


def checked(path: Path, seconds: float = 120.0) -> None:
    """Return when a file is there."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.05)


def workers_of(out: Path) -> list[int]:
    """Processes that work on a search, the runs of its trials not among them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"hydrazero.trainer.search.worker" in words and str(out).encode() in words:
            found.append(int(folder.name))
    return found


@pytest.mark.ranks
def test_two_workers_share_a_search_and_one_takes_up_what_the_other_has_left(root, tmp_path, monkeypatch):
    # Trials long enough that none is over before a worker is killed.
    space, out = write_space(root, "shared", seconds=4.0, rungs=1), root / "shared"
    # As a task of srun among others, which is no matter of the ranks of its trials.
    process = search(space, "--trials", 2, "--workers", 2, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1")
    try:
        for number in (0, 1):
            checked(out / "trials" / f"000{number}" / "metrics.jsonl")
        os.kill(min(workers_of(out)), signal.SIGKILL)
        printed = process.communicate(timeout=240)[0]
    finally:
        process.kill()
    assert process.returncode == 0, printed
    assert workers_of(out) == []
    rows = trial_rows(open_journal(out))
    assert [(row.number, row.state) for row in rows] == [(0, "finished"), (1, "finished")], printed
    assert {row.values["model.encoder"] for row in rows} == {"painn", "schnet"}
    assert len({row.values["deepspeed.optimizer.params.lr"] for row in rows}) == 2
    resumes = [json.loads((out / "trials" / f"000{n}" / "run.json").read_text())["resumes"] for n in (0, 1)]
    assert sorted(map(len, resumes)) == [0, 1]  # one was left, and taken up
    for row in rows:
        (result,) = row.results
        assert 4.0 <= result["seconds"] < 15 and 0 < result["error"] < 5
        assert result["training"] > 0 and result["inference"] > 0
    assert "to train the best trial with all steps: hydrazero train" in printed
    page = (out / "search.html").read_text()
    assert "2 trials: 2 finished" in page and "By encoder" in page and "Pareto front" in page
    monkeypatch.setattr(results_page, "PAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["search_page", str(out)])
    results_page.main()
    held = (tmp_path / "search.md").read_text()
    assert "2 trials (2 finished)" in held and "| `painn` | 1 | 1 | " in held
    assert all((tmp_path / f"search-{name}.png").is_file() for name in ("progress", "front", "settings"))
    # What is done is not done again, and a space that is another is refused.
    again = CliRunner().invoke(main, ["search", str(space), "--trials", "2"])
    assert again.exit_code == 0 and len(trial_rows(open_journal(out))) == 2, again.output
    other = CliRunner().invoke(main, ["search", str(write_space(root, "shared", seconds=9)), "--trials", "3"])
    assert other.exit_code == 1 and "began with other content of" in other.output


@pytest.mark.ranks
def test_a_trial_fails_and_one_that_was_stopped_goes_on_from_its_checkpoint(root, capsys):
    """Two rungs, two objectives; values that do not go together in the first trial, a stop in the second."""
    vary = '"model.node_degree" = [2, 1]\n"model.max_degree" = [1, 3]'
    journal = begin(write_space(root, "stopped", vary=vary, seconds=4, more='rate = "training"'))
    run = journal.run_dir(1)

    def ask_to_stop() -> None:
        checked(run / "metrics.jsonl")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = Thread(target=ask_to_stop)
    thread.start()
    with pytest.raises(SearchStoppedError, match="trial 1 was stopped"):
        work(journal, 1)
    thread.join()
    held = journal.take(1)
    assert held is not None and held.number == 1 and held.values == {"model.node_degree": 1, "model.max_degree": 3}
    assert journal.take(1) is None  # no more are wanted, and this one is in other hands
    held.lock.lock.release()
    work(open_journal(journal.out), 1)
    failed, finished = trial_rows(journal)
    assert (failed.state, failed.results) == ("failed", []) and "must obey 1 <= node_degree <= max" in failed.reason
    assert finished.state == "finished" and [each["goes_on"] for each in finished.results] == [True, False]
    first, last = finished.results
    assert 2 <= first["seconds"] < 4 <= last["seconds"] and first["step"] < last["step"]
    resumes = [each["step"] for each in json.loads((run / "run.json").read_text())["resumes"]]
    assert 0 < resumes[0] <= resumes[1] == first["step"]
    spent = sum(1 / each["steps_per_s"] for each in read_metrics(run) if each["kind"] == "train")
    assert last["seconds"] <= spent  # the first steps of all starts do not count
    assert journal.study.best_trials[0].values == [last["error"], last["training"]]
    assert "trial 0 failed: " in (printed := capsys.readouterr().out) and "trial 1 finished at 4 s: " in printed
    assert "Failed trials" in write_search_page(journal).read_text()


def test_a_line_that_was_cut_short_is_all_that_is_lost(root):
    def taken() -> int:
        held = begin(space).take(2)
        assert held is not None
        held.lock.lock.release()
        return held.number

    space = write_space(root, "cut")
    assert taken() == 0
    file = root / "cut" / JOURNAL_NAME
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code": 4, "worker')  # a full disk
    assert (taken(), taken()) == (0, 0)
    assert file.read_bytes().startswith(whole) and len(trial_rows(open_journal(root / "cut"))) == 1
