"""Run folders as others may hand them over: commands in records, pickles in checkpoints, other models, other runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from run_files import write_small_run
from sources import make_shards, metals, molecules

from hydrazero.launch.cli.main import main
from hydrazero.models import read_card
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import write_json
from hydrazero.shards.stream.state import rank_state, start_of_stream
from hydrazero.trainer.checkpoint.folders import CHECKSUMS_NAME, checkpoints, file_sum
from hydrazero.trainer.checkpoint.safe_load import safe_load

TRAIN = {"steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "log_every": 2, "average": 0.9}


def hydrazero(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(result: Result, *said: str) -> None:
    assert result.exit_code == 1 and result.output.count("Error: ") == 1, result.output
    for words in said:
        assert words in result.output, result.output


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards of two tasks, and two runs on them, of which the first one is evaluated."""
    folder = tmp_path_factory.mktemp("home")
    make_shards(folder, "molecules", molecules(60))
    make_shards(folder, "metals", metals(40))
    for name, seed in (("one", 0), ("two", 1)):
        out = {"out": str(folder / name / "run"), "seed": seed}
        path = write_small_run(folder / name, folder, run=out, train=TRAIN, balance={"method": "famo"})
        result = hydrazero("train", path)
        assert result.exit_code == 0, result.output
    assert hydrazero("evaluate", folder / "one" / "run").exit_code == 0
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of the first run as somebody else received it."""
    return Path(shutil.copytree(home / "one" / "run", tmp_path / "run"))


def resume(run: Path) -> Result:
    return hydrazero("train", run.parent / "run.toml", "--resume", "--set", "train.steps=6")


def place(home: Path, run: Path) -> None:
    """Write a run file that resumes the copy."""
    out = {"out": str(run), "seed": 0}
    write_small_run(run.parent, home, run=out, train=TRAIN, balance={"method": "famo"})


def sign(folder: Path) -> None:
    """Make the checksums of a checkpoint those of its files."""
    names = json.loads((folder / CHECKSUMS_NAME).read_text())
    write_json(folder / CHECKSUMS_NAME, {name: file_sum(folder / name) for name in names})


class Calls:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


def test_a_received_run_works(home, run, tmp_path):
    result = hydrazero("export", run, "--out", tmp_path / "m.safetensors")
    assert result.exit_code == 0, result.output
    card = read_card(tmp_path / "m.safetensors")
    assert card["tasks"]["metals"]["errors"]["structures"] > 0 and "no_errors" not in card
    place(home, run)
    assert resume(run).exit_code == 0


def test_a_command_in_the_record_of_a_run_is_not_run(home, run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    record["tasks"][0]["shards"] = f"pipe:touch {tmp_path}/made; cat {home}/molecules/{{}}"
    write_json(run / "run.json", record)
    refused(hydrazero("evaluate", run), "names a command for its shards", f"hydrazero evaluate {run} DIR")
    result = hydrazero("evaluate", run, home / "molecules")
    assert result.exit_code == 0, result.output
    refused(hydrazero("evaluate", run, f"pipe:touch {tmp_path}/made; {{}}"), "a command (pipe:) is run only for the")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name", ["run_state.pt", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_no_code_of_a_checkpoint_is_run(home, run, tmp_path, name):
    for folder in checkpoints(run):
        content = torch.load(folder / name, weights_only=False)
        torch.save({**content, "added": Calls(tmp_path / "made")}, folder / name)
        sign(folder)
    place(home, run)
    said = (name, "is not loaded, since that would call")
    refused(hydrazero("export", run, "--out", tmp_path / "m.safetensors"), *said)
    refused(hydrazero("evaluate", run), *said)
    refused(resume(run), *said)
    assert not (tmp_path / "made").exists() and not (tmp_path / "m.safetensors").exists()


def test_plain_pickles_and_damaged_files_are_errors(tmp_path):
    path = tmp_path / "state.pt"
    for content in (pickle.dumps(Calls(tmp_path / "made")), b"", b"PK\x03\x04", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"state\.pt (is not loaded|cannot be read)"):
            safe_load(path)
    torch.save({"a": torch.ones(3), "b": [1, "x", b"y"]}, path)
    assert zipfile.is_zipfile(path) and safe_load(path)["b"] == [1, "x", b"y"]
    assert not (tmp_path / "made").exists()


def test_positions_in_the_data_hold_no_code(tmp_path):
    assert rank_state((), 1) == b'{"turn":1,"lanes":[]}'
    for rank in (pickle.dumps(Calls(tmp_path / "made"), protocol=4), b"{}", b'{"lanes":[{"epoch":1}]}', 5):
        state = {"fingerprint": "", "past": [], "ranks": [rank]}
        with pytest.raises(ConfigError, match="position in the data cannot be read"):
            start_of_stream([], 0, 1, 0, state)
    assert not (tmp_path / "made").exists()


def test_facts_that_were_changed_after_training_are_not_exported(home, run, tmp_path):
    facts = json.loads((run / "model.json").read_text())
    facts["tasks"][0]["scale"] *= 2
    write_json(run / "model.json", facts)
    place(home, run)
    said = "model.json is not the one with which checkpoint"
    refused(hydrazero("export", run, "--out", tmp_path / "m.safetensors"), said)
    refused(hydrazero("evaluate", run), said)
    assert resume(run).exit_code == 1
    assert not (tmp_path / "m.safetensors").exists()


def test_a_checkpoint_of_another_run_is_not_used(home, run, tmp_path):
    for folder in checkpoints(run):
        shutil.rmtree(folder)
        shutil.copytree(home / "two" / "run" / "checkpoints" / folder.name, folder)
    place(home, run)
    said = "was written by another run than the one in"
    refused(hydrazero("export", run, "--out", tmp_path / "m.safetensors"), said)
    refused(hydrazero("evaluate", run), said)
    refused(resume(run), said)


def test_an_evaluation_of_other_facts_gives_no_errors(run, tmp_path):
    evaluation = json.loads((run / "evaluation.json").read_text())
    for number, digest in enumerate(("0" * 64, None)):
        write_json(run / "evaluation.json", {**evaluation, "model": digest})
        out = tmp_path / f"{number}.safetensors"
        assert hydrazero("export", run, "--out", out).exit_code == 0
        card = read_card(out)
        assert card["no_errors"] == "its run's last evaluation used other weights or facts"
        assert all(task["errors"] is None for task in card["tasks"].values())


def test_files_of_a_checkpoint_are_regular_files_inside_it(run, tmp_path):
    last = checkpoints(run)[-1]
    sums = json.loads((last / CHECKSUMS_NAME).read_text())
    write_json(last / CHECKSUMS_NAME, {**sums, "../../run.json": file_sum(run / "run.json")})
    refused(hydrazero("evaluate", run), "is not a name of a file in a folder")
    write_json(last / CHECKSUMS_NAME, sums)
    outside = tmp_path / "outside.pt"
    shutil.move(last / "run_state.pt", outside)
    (last / "run_state.pt").symlink_to(outside)
    refused(hydrazero("evaluate", run), "run_state.pt is a symbolic link that leads out of its folder")
    (last / "run_state.pt").unlink()
    os.mkfifo(last / "run_state.pt")
    refused(hydrazero("evaluate", run), "run_state.pt is not a regular file")


def test_tasks_of_an_evaluation_are_names(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["tasks"]["../../elsewhere"] = evaluation["tasks"].pop("metals")
    write_json(run / "evaluation.json", evaluation)
    refused(hydrazero("report", run), "'../../elsewhere' cannot be used as the name of a file")


@pytest.mark.parametrize("name", ["run.json", "model.json", "metrics.jsonl", "evaluation.json"])
def test_pipes_in_a_run_folder_hang_nothing(home, run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    place(home, run)
    for result in (hydrazero("report", run), resume(run)):
        assert isinstance(result.exception, SystemExit | None), repr(result.exception)


def test_a_run_file_that_a_user_starts_may_name_commands(home, tmp_path):
    tasks = [{"name": "metals", "shards": f"pipe:cat {home}/metals/{{}}"}]
    path = write_small_run(tmp_path, home, tasks=tasks, train=TRAIN, balance={"method": "uniform"})
    for words in (("--dry-run",), (), ("--resume", "--set", "train.steps=6")):
        result = hydrazero("train", path, *words)
        assert result.exit_code == 0, result.output
    refused(hydrazero("evaluate", tmp_path / "run"), "names a command for its shards")
    assert hydrazero("evaluate", tmp_path / "run", home / "metals").exit_code == 0


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("run_state.pt", {"step": "x"}, "run_state.pt has other content than it should have (step: "),
        ("run_state.pt", {"step": 2}, "run_state.pt is of step 2"),
        ("run_state.pt", {"best": {"a": 1}}, "(best.step: "),
        ("run_state.pt", {"interval": {"a": 1}}, "does not hold the state of this run ('since' is missing)"),
        ("run_state.pt", {"balance": {"a": 1}}, "does not hold the state of this run ('method' is missing)"),
        ("run_state.pt", {"layout": {"a": 1}}, "does not hold the state of this run ('places' is missing)"),
        ("run_state.pt", {"random": {"cpu": 1}}, "does not hold the state of this run"),
        ("run_state.pt", {"settings": {"a": 1}}, "the run has the setting 'a', which this version of "),
        ("run_state.pt", {"stream": {"a": 1}}, "position in the data belongs to other shards"),
        ("run_state.pt", {"facts_sha256": None}, "model.json is not the one with which checkpoint"),
        ("mp_rank_00_model_states.pt", {"module": None}, "does not hold the state of this run"),
        (
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            {"optimizer_state_dict": None},
            "does not hold the state of this",
        ),
    ],
)
def test_checkpoints_of_another_form_are_named(home, run, name, changed, said):
    for folder in checkpoints(run)[-1:]:
        content = torch.load(folder / name, weights_only=False)
        torch.save({**content, **changed}, folder / name)
        sign(folder)
    place(home, run)
    refused(resume(run), said)


def test_the_advice_of_torch_to_load_pickles_is_not_repeated(tmp_path):
    path = tmp_path / "state.pt"
    torch.save(Calls(tmp_path / "made"), path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ConfigError, match=r"state.pt is not loaded, since that would call '[\w.]+'; use one from"
    ) as caught:
        safe_load(path)
    assert "weights_only" not in str(caught.value)
