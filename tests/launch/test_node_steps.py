"""Checks and copies of nodes before ranks start: failures, time limits, and jobs that are stopped meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner
from launched import launch, run_script, script_path, start_script, write_site
from torture import make_data, write_run

from hydrazero.launch.node import check as node_check
from hydrazero.launch.node import copy_shards as node_copy
from hydrazero.launch.node import steps as node_steps
from hydrazero.launch.node.check import check_devices, check_disk, check_space
from hydrazero.launch.node.records import PASSED, UNFIT, add_event, all_events, read_attempt
from hydrazero.launch.node.silent_nodes import silent_nodes
from hydrazero.launch.postmortem import CANCELLED, FAILED, STOPPED, RunProgress, judge
from hydrazero.shards.errors import ConfigError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("steps"))


@pytest.fixture
def run_file(data, tmp_path) -> Path:
    return write_run(tmp_path, data, 3)


def test_what_makes_a_node_unfit(tmp_path):
    check_disk(tmp_path / "made" / "here")
    with pytest.raises(ConfigError, match=r"has space for .* GB, but the shards have 1000000000"):
        check_space(tmp_path, 10**18)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        check_disk(tmp_path / "file" / "folder")
    with pytest.raises(ConfigError, match=r"torch sees \d of 99 GPUs"):
        check_devices(99)
    with pytest.raises(ConfigError, match=r"'sh -c 'exit 3'' ended with exit status 3"):
        node_check.check_health(["sh", "-c", "exit 3"])
    with pytest.raises(ConfigError, match=r"'no-such-program' cannot be started \(No such file"):
        node_check.check_health(["no-such-program"])


def check(monkeypatch: pytest.MonkeyPatch, attempt: Path, *options: object) -> tuple[int, str]:
    """Run the check of a node in this process."""

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(node_steps, "_end", end)
    words = ["--attempt", attempt, "--within", 60, *options]
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(node_check.main, [str(word) for word in words])
    signal.signal(signal.SIGTERM, before)
    return result.exit_code, result.output


def test_space_is_needed_only_in_the_folder_for_copies(tmp_path, monkeypatch):
    """A small /tmp does no harm, and copies of an earlier attempt are overwritten."""
    small, copies = tmp_path / "small", tmp_path / "copies"
    copies.mkdir()
    (copies / "earlier").write_bytes(b"x" * 60)
    monkeypatch.setattr(node_check.shutil, "disk_usage", lambda folder: Usage(100, 0, 50 if folder == copies else 1))
    options = ("--folder", small, "--copies", copies, "--room")
    assert check(monkeypatch, tmp_path, *options, 110) == (0, "")
    status, output = check(monkeypatch, tmp_path, *options, 111)
    assert status == 1 and re.search(f"cannot take part: {copies} has space for", output)
    assert [row["event"] for row in all_events(tmp_path)] == [PASSED, UNFIT]


def test_a_node_that_hangs_names_the_step(tmp_path):
    words = ["--attempt", str(tmp_path), "--within", "0.5", "--folder", str(tmp_path / "a"), "sleep", "600"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "hydrazero.launch.node.check", *words], capture_output=True, text=True, timeout=60
    )
    assert time.monotonic() - began < 30
    assert done.returncode == 1 and re.fullmatch(
        r"Error: node \S+ cannot take part: 'sleep 600' has not ended within 0.5 s.\n", done.stderr
    )
    assert read_attempt(tmp_path).unfit[0][1] == "'sleep 600' has not ended within 0.5 s"


def test_a_node_that_receives_sigterm_leaves_nothing_on_its_disk(data, tmp_path):
    """Slurm starts nothing more for a cancelled job, so its script cannot clean up."""
    words = ["--attempt", tmp_path, "--within", "60", "--folder", tmp_path / "a", "--copies", tmp_path / "b"]
    process = subprocess.Popen([sys.executable, "-m", "hydrazero.launch.node.check", *map(str, words), "sleep", "600"])
    until = time.monotonic() + 60
    while b"\nsleep\x00600" not in children(process.pid):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_unexpected_faults_are_named_too(tmp_path, monkeypatch):
    def broken(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(node_check, "check_disk", broken)
    status, output = check(monkeypatch, tmp_path, "--folder", tmp_path)
    assert status == 1 and "cannot take part: OSError: [Errno 5] Input/output error" in output
    status, output = check(monkeypatch, tmp_path / "absent")
    assert status == 1 and f"it cannot write to {tmp_path / 'absent'} (No such file or directory)" in output


def test_silent_nodes_are_named_if_they_can_be(tmp_path):
    for node, facts in {"n1": {}, "n2": {"address": "10.0.0.2"}, "n4": {}}.items():
        add_event(tmp_path, node, PASSED, part="check", **facts)
    add_event(tmp_path, "n5", UNFIT, reason="no")
    nodes = ["n1", "10.0.0.2", "n3", "n4.cluster", "n5"]
    assert silent_nodes(tmp_path, "check", nodes) == (["n3"], 1)
    assert silent_nodes(tmp_path, "copy", nodes) == (nodes[:4], 4)
    # A node has responded under a name that is not in the hostfile.
    assert silent_nodes(tmp_path, "check", [*nodes[1:], "alias"]) == (["n3", "alias"], 1)


def test_copies_are_complete_and_faults_name_the_file(data, tmp_path):
    folders = {"a": data / "molecules", "b": data / "metals"}
    node_copy.copy_tasks(folders, tmp_path / "copies", "n1")
    for task, folder in folders.items():
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        assert names and sorted(path.name for path in (tmp_path / "copies" / task).iterdir()) == names
        for name in names:
            assert (tmp_path / "copies" / task / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(ConfigError, match=r"absent cannot be read \(No such file"):
        node_copy.copy_tasks({"a": data / "absent"}, tmp_path, "n1")
    (tmp_path / "blocked" / "a" / "manifest.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"manifest.json cannot be copied to .* \(Is a directory\)"):
        node_copy.copy_tasks(folders, tmp_path / "blocked", "n1")


@pytest.mark.parametrize("told, kind", [("USR1", STOPPED), ("TERM", CANCELLED), ("USR1 TERM", CANCELLED), ("", FAILED)])
def test_jobs_that_were_told_to_stop_before_a_rank_had_started(tmp_path, told, kind):
    (tmp_path / "told").write_text(f" {told}\n")
    assert judge(read_attempt(tmp_path), RunProgress(step=0, steps=0)).kind == kind


def test_a_cancelled_job_has_not_failed_whatever_its_ranks_say(tmp_path):
    (tmp_path / "told").write_text(" TERM\n")
    for status, said in ((-9, "cancelled by SIGTERM: rank 0 on n1 was killed by"), (0, "stopped at step 5 of 9")):
        add_event(tmp_path, "n1", "start", rank=0, ranks=1, local=0, pid=1)
        add_event(tmp_path, "n1", "told", rank=0, signal="SIGUSR1")  # srun gets this signal instead of SIGTERM
        add_event(tmp_path, "n1", "end", rank=0, status=status, tail=[])
        verdict = judge(read_attempt(tmp_path), RunProgress(step=5, steps=9))
        assert verdict.kind == CANCELLED and verdict.sentence.startswith(said)


def waiting_job(run_file: Path, *, copying: bool) -> Path:
    """Write the script of a job whose check or copying never ends; return its path."""
    again = f"requeue = 'touch {run_file.parent}/again'"
    health = [] if copying else ["health = 'sleep 600'"]
    site = write_site(run_file.parent, again, *health)
    assert launch(run_file, "--site", site, "--ranks-per-node", 1).exit_code == 0
    script = script_path(run_file)
    if copying:
        text = script.read_text()
        script.write_text(re.sub(r'"\$python" -m hydrazero.launch.node.copy_shards', "sleep 600 #", text))
        assert script.read_text() != text
    return script


@pytest.mark.parametrize(
    "copying, name, said, status",
    [
        (False, "TERM", "cancelled by SIGTERM before a rank had started\n", 0),
        (True, "TERM", "cancelled by SIGTERM before a rank had started\n", 0),
        (True, "USR1", "was nearly over before a rank had started\nthe job should not be restarted: its time", 1),
    ],
    ids=["cancelled in the check", "cancelled while copying", "time over while copying"],
)
def test_a_job_that_receives_a_signal_before_ranks_start_stops_at_once(run_file, copying, name, said, status):
    process = start_script(waiting_job(run_file, copying=copying))
    try:
        attempt = run_file.parent / "run" / "launch" / "attempt-0001"
        until = time.monotonic() + 60
        while b"\nsleep\x00600" not in children(process.pid):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(getattr(signal, f"SIG{name}"))
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - began < 30 and process.returncode == status, output
    assert said in output and "cannot take part" not in output, output
    assert (attempt / "told").read_text().split() == [name]
    assert not (run_file.parent / "again").exists() and not list((run_file.parent / "disk").iterdir())


def children(pid: int) -> bytes:
    """Return the command lines of all descendants of a process."""
    below, lines = {pid}, b""
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent in below:
            below.add(int(path.name))
            lines += b"\n" + command
    return lines


def test_a_node_that_does_not_respond_is_named(run_file):
    site = write_site(run_file.parent, "retries = 0")
    assert launch(run_file, "--site", site, "--ranks-per-node", 1).exit_code == 0
    script = script_path(run_file)
    text = script.read_text().replace("all_nodes check 720", "all_nodes check 1")
    script.write_text(re.sub(r'"\$python" -m hydrazero.launch.node.check', "sleep 600 #", text))
    status, output = run_script(script)
    node = os.uname().nodename
    assert status == 1 and f"Error: node {node} cannot take part: no response to the check within 1 s.\n" in output, (
        output
    )
    assert f"nodes failed the check (node {node}: no response to the check within 1 s)" in output
