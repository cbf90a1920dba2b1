"""What a job script and its hosts are made of: hostfiles, accounts, queues and site files of any origin."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from launched import SITES, launch, refused, script_path
from torture import make_data, write_run

from hydrazero.launch.job import hosts as hosts_module
from hydrazero.launch.job.hosts import read_hostfile
from hydrazero.launch.node.records import SIGNALS_NAME, add_event, read_attempt
from hydrazero.shards.errors import ConfigError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("jobs"))


@pytest.fixture
def run_file(data, tmp_path) -> Path:
    return write_run(tmp_path, data, 3)


@pytest.mark.parametrize(
    "host",
    [
        "-oProxyCommand=touch made",
        "-oProxyCommand=touch${IFS}made",
        *("a;touch", "$(touch)", "`touch`", "a|b", "[a-c]", "a,b", "a@-b", "%h"),
    ],
)
def test_hosts_are_names(run_file, tmp_path, monkeypatch, host):
    monkeypatch.setattr(hosts_module.subprocess, "run", lambda *_, **__: pytest.fail("a program was started"))
    hostfile = tmp_path / "hosts"
    hostfile.write_text(f"node1 slots=1\n{host} slots=1\n")
    options = ("--site", "local", "--nodes", 2, "--hostfile", hostfile)
    refused(launch(run_file, *options), f"line 2: .*{re.escape(host[:2])}.* does not have the form 'HOST slots=N'")
    assert not script_path(run_file).exists()


def test_hosts_that_are_reached(tmp_path, monkeypatch):
    path = tmp_path / "hosts"
    path.write_text("node-1.example.org slots=4\nuser_1@node2 slots=4\nfe80::1 slots=2 # IPv6\n10.0.0.1 slots=1\n")
    found = read_hostfile(path)
    assert list(found) == ["node-1.example.org", "user_1@node2", "fe80::1", "10.0.0.1"]
    started = []
    monkeypatch.setattr(hosts_module.shutil, "which", lambda name: name)

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(words)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(hosts_module.subprocess, "run", run)
    hosts_module.check_hosts(("node1",))
    assert started == [["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", "node1", "true"]]
    for text in (f"a slots={'9' * 5000}\n", "a slots=٣\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="does not have the form"):
            read_hostfile(path)
    path.write_bytes(b"n\xf6de slots=1\n")
    with pytest.raises(ConfigError, match="is not a text in UTF-8"):
        read_hostfile(path)
    path.write_text("-" * 10**6)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert len(str(caught.value)) < 500
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_hostfile(path)


def test_signals_that_are_no_text_do_no_harm(tmp_path):
    (tmp_path / SIGNALS_NAME).write_bytes(b"TERM \xff\n")
    assert read_attempt(tmp_path).signals == ("SIGTERM", "SIG\ufffd")


@pytest.mark.parametrize("site", ["slurm", "aurora"])
@pytest.mark.parametrize("option", ["--account", "--queue", "--set"])
def test_options_are_one_line(run_file, site, option):
    ending = "\n#SBATCH --uid=root\n#PBS -u root\ntouch made"
    value = f"data.copies=/tmp{ending}" if option == "--set" else f"me{ending}"
    others = () if option == "--account" else ("--account", "me")
    refused(launch(run_file, "--site", site, option, value, *others), f"{option} .*holds a line break or")
    assert not script_path(run_file).exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a\ntouch made"),
        ("about", "\x1b]0;title\x07"),
        ("queue", "q\ntouch made"),
        ("directives", ["--x\ntouch made"]),
        ("setup", ["true\ntouch made"]),
        ("launcher", "srun\ntouch made"),
        ("health", "true\ntouch made"),
        ("requeue", "true\ntouch made"),
        ("node_folders", ["/a\ntouch made"]),
        ("node_local", '/tmp/$(touch made)"'),
        ("node_local", "/tmp/`touch made`"),
        ("node_local", "/tmp; touch made"),
    ],
)
def test_texts_of_sites_are_one_line(run_file, tmp_path, key, value):
    text = (SITES / "slurm.toml").read_text()
    for name in ("queue", "health", "requeue", "node_folders", "node_local", "directives", "setup", "launcher"):
        if key == name:
            text = re.sub(rf"^{name} = (\[\n(.*\n)*?\]|.*)$", "", text, count=1, flags=re.MULTILINE)
    line = f"{key} = {json.dumps(value)}\n"
    if key in ("name", "about"):
        text = re.sub(rf"^{key} = .*\n", lambda _: line, text, count=1, flags=re.MULTILINE)
    else:
        table = "[files]\n" if key == "node_local" else "[job]\n"
        text = text.replace(table, table + line)
    site = tmp_path / "site.toml"
    site.write_text(text)
    refused(launch(run_file, "--site", site), f"{key}.*(control character|is no folder of a node)")


def test_the_command_in_a_script_is_a_comment(run_file, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hydrazero", "launch", "x\n#SBATCH --uid=root\ntouch made"])
    assert launch(run_file, "--site", "slurm").exit_code == 0
    lines = script_path(run_file).read_text().splitlines()
    assert not [line for line in lines if line.startswith(("touch", "#SBATCH --uid"))]
    assert any("#SBATCH --uid=root" in line and line.startswith("#     hydrazero launch") for line in lines)


def test_pipes_among_the_records_of_a_job_hang_nothing(tmp_path):
    attempt = tmp_path / "launch" / "attempt-0001"
    attempt.mkdir(parents=True)
    for name in ("node1.jsonl", "told", "job.json", "verdict.json"):
        os.mkfifo(attempt / name)
    assert read_attempt(attempt).ranks == () and read_attempt(attempt).signals == ()
    with pytest.raises(OSError, match="No such device"):
        add_event(attempt, "node1", "start")
    (attempt / "node2.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        add_event(attempt, "node2", "start")
    assert not (tmp_path / "elsewhere").exists()
