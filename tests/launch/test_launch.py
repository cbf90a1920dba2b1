"""Job scripts of every site, rejected requests, and a job that runs without a scheduler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from launched import SITES, launch, refused, run_script, script_of, script_path, write_site
from torture import make_data, write_run

from hydrazero.launch.job.hosts import chosen_hosts, read_hostfile
from hydrazero.launch.job.job import longest_hours
from hydrazero.launch.job.site_file import load_site, site_names
from hydrazero.launch.node.check import check_devices
from hydrazero.shards.device import BACKENDS, device_kind
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.ranks.distributed import device
from hydrazero.trainer.records.run_record import run_record


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("launch"))


@pytest.fixture
def run_file(data, tmp_path) -> Path:
    return write_run(tmp_path, data, 3)


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Put only a shell and these programs on the path."""
    folder.mkdir()
    for name, text in {**{each: f'exec {shutil.which(each)} "$@"' for each in ("bash", "sh")}, **texts}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize("site", site_names())
def test_every_site_gets_a_script_that_a_shell_understands(site, run_file):
    nodes = 1 if site == "local" else 3
    text = script_of(run_file, "--site", site, "--nodes", nodes, "--account", "chm123", "--set", "run.seed=7")
    checker = ["shellcheck", "-"] if shutil.which("shellcheck") else ["bash", "-n"]
    done = subprocess.run(checker, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"(?<!\$)\{[a-z_]+\}", text), "a placeholder was not replaced"
    known = load_site(site)
    assert "hydrazero.trainer.train" in text and "--set run.seed=7" in text
    assert f"--retries {known.job.retries}" in text
    for variable in known.variables:
        assert re.search(rf"^# .*\n{variable.name}=\"[^\n]*\"\nexport {variable.name}$", text, flags=re.MULTILINE)
        assert variable.reason.endswith((".", "...")) and len(variable.reason) > 15
    if known.scheduler == "slurm":
        for line in ("--nodes=3", "--account=chm123", "--requeue", "--signal=B:USR1@300", "--open-mode=append"):
            assert f"#SBATCH {line}\n" in text
        assert f"--ntasks={3 * known.nodes.dies} " in text and 'scontrol requeue "$SLURM_JOB_ID"' in text
    elif known.scheduler == "pbs":
        assert "#PBS -l select=3\n" in text and f"mpiexec -n {3 * known.nodes.dies} " in text
        assert "--stop-after $((21300 - SECONDS))" in text and "qsub -v HYDRAZERO_RESUME=--resume" in text


def test_shards_go_to_the_disks_of_nodes_that_have_them(run_file):
    options = ("--site", "frontier", "--account", "a")
    text = script_of(run_file, *options)
    assert (
        "hydrazero.launch.node.copy_shards" in text and '--set data.copies="$copies"' in text and "--one-device" in text
    )
    assert re.search(r'--copies "\$copies" --room [1-9]\d{3,}', text) and 'rm -rf "/tmp/' in text
    text = script_of(run_file, *options, "--no-stage")
    assert "copy_shards" not in text and "copies" not in text


def test_a_queue_has_its_own_hours(run_file):
    site = load_site("frontier")
    assert [longest_hours(site, nodes, "") for nodes in (91, 92, 184)] == [2.0, 6.0, 12.0]
    assert longest_hours(site, 64, "extended") == site.nodes.hours
    assert "#SBATCH --time=1:30:00\n" in script_of(run_file, "--site", "frontier", "--account", "a", "--hours", 1.5)


BAD = {
    "nodes": (["--site", "frontier", "--account", "a", "--nodes", 99999], r"--nodes is 99999, but jobs of site front"),
    "hours": (["--site", "frontier", "--account", "a", "--hours", 3], r"limits jobs with --nodes 1 to 2 hours"),
    "short": (["--site", "slurm", "--hours", 0.1], r"hardly any time would be left"),
    "account": (["--site", "aurora"], r"site aurora charges each job to an account; name it with --account"),
    "site": (["--site", "fronteer"], r"--site 'fronteer' is not known \(did you mean 'frontier'\?\)"),
    "file": (["--site", "mine.toml"], r"site file mine.toml cannot be read"),
    "hosts": (["--site", "local", "--nodes", 2], r"the hosts must be named: --hostfile FILE"),
    "hostfile": (["--site", "slurm", "--hostfile", "x"], r"--hostfile is only for sites without a scheduler"),
    "no hostfile": (["--site", "local", "--hostfile", "absent"], r"hostfile absent cannot be read"),
    "value": (["--site", "slurm", "--set", "data.workers=-1"], r"data.workers is -1"),
    "budget": (["--site", "slurm", "--set", "batch.atoms=2"], r"batch"),
    "resume": (["--site", "slurm", "--resume"], r"holds no run to resume; leave out --resume"),
}


def test_site_files_with_the_former_name_of_the_rank_module_keep_working(run_file, tmp_path):
    text = (SITES / "slurm.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("-m hydrazero.launch.node.rank", "-m hydrazero.launch.rank"))
    assert path.read_text() != text
    script = script_of(run_file, "--site", path)
    assert "-m hydrazero.launch.node.rank " in script and "hydrazero.launch.rank" not in script


@pytest.mark.parametrize("name", BAD)
def test_what_a_site_cannot_do_is_rejected_before_anything_is_written(name, run_file):
    options, said = BAD[name]
    refused(launch(run_file, *options), said)
    assert not (run_file.parent / "run").exists()


def test_the_run_file_is_checked_against_its_shards(run_file):
    run_file.write_text(run_file.read_text().replace("/molecules", "/absent"))
    refused(launch(run_file, "--site", "slurm"), "task 'molecules' has no shards: .*/absent does not exist")
    assert not (run_file.parent / "run").exists()


def test_an_existing_run_is_continued_only_with_resume(run_file):
    record = run_file.parent / "run" / "run.json"
    record.parent.mkdir()
    config = load_run_config(run_file)
    settings = {**config.model_dump(), "deepspeed": deepspeed_config(config.deepspeed, config.train.steps)}
    record.write_text(json.dumps(run_record(settings, ranks=2)))
    refused(launch(run_file, "--site", "slurm"), "holds a run already; use --resume")
    result = launch(run_file, "--site", "slurm", "--resume")
    assert result.exit_code == 0, result.output
    assert "\nresume=--resume\n" in Path(result.output.strip()).read_text()


def test_a_job_for_gpus_can_be_written_on_a_machine_without_one(run_file):
    options = ("--set", "deepspeed.config=zero1_fp16")
    refused(launch(run_file, "--site", "local", *options), "needs a GPU")
    script_of(run_file, "--site", "frontier", "--account", "a", *options)


def test_a_scheduler_that_is_missing_old_or_not_set_up(run_file, tmp_path, monkeypatch):
    options = ("--site", "slurm", "--submit")
    programs(tmp_path / "none", monkeypatch)
    refused(launch(run_file, *options), "--submit needs sbatch, which is not on the path")
    programs(tmp_path / "old", monkeypatch, sbatch="exit 1", sinfo="echo slurm 17.11.2")
    said = "'sinfo --version' prints version 17.11.2, but jobs of site slurm need at least 19.05"
    refused(launch(run_file, *options), said)
    programs(tmp_path / "unset", monkeypatch, sbatch="exit 1", sinfo="echo fatal: no configuration >&2; exit 1")
    refused(launch(run_file, *options), r"prints no version \(fatal: no configuration\)")
    assert not (run_file.parent / "run").exists()
    programs(tmp_path / "full", monkeypatch, sbatch="echo error: bad account >&2; exit 1", sinfo="echo slurm 23.02.7")
    refused(launch(run_file, *options), "the scheduler rejects .*/job.sh: error: bad account")
    programs(tmp_path / "good", monkeypatch, sbatch="echo '4711;cluster'", sinfo="echo slurm-wlm 22.05.8")
    result = launch(run_file, *options)
    assert result.output == f"job 4711: {run_file.parent / 'run' / 'launch' / 'job.sh'}\n", result.output


def test_hostfiles(run_file, tmp_path, monkeypatch):
    hostfile = tmp_path / "hosts"
    for text, said in (
        ("", "names no host"),
        ("a slots=2\n\n# b\nb 2\n", "line 4: 'b 2' does not have the form 'HOST slots=N'"),
        ("a slots=2\na slots=2\n", "line 2: host a is named twice"),
        ("a slots=2\nb slots=0\n", "line 2: host b has no slots"),
    ):
        hostfile.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_hostfile(hostfile)
    hostfile.write_text("# head\na slots=2 # first\nb slots=1\n")
    assert read_hostfile(hostfile) == {"a": 2, "b": 1}
    # An ssh that reaches only host a.
    ssh = 'case "$*" in *" a true") exit 0;; esac; echo "ssh: host b: No route to host" >&2; exit 255'
    programs(tmp_path / "bin", monkeypatch, ssh=ssh, pdsh="exit 0")
    options = ("--site", "local", "--hostfile", hostfile, "--ranks-per-node")
    refused(launch(run_file, *options, 1, "--nodes", 3), "--nodes is 3, but hostfile .* has 2 hosts")
    refused(launch(run_file, *options, 2, "--nodes", 2), "host b has slots=1 in hostfile .*, but --ranks-per-node is 2")
    refused(launch(run_file, *options, 1, "--nodes", 2), r"not reached by ssh without a password: b \(ssh: .* No route")
    assert not (run_file.parent / "run").exists()
    text = script_of(run_file, *options, 2)
    assert f"--hostfile={hostfile} --num_nodes=1" in text and 'pdsh -R ssh -S -w "a"' in text and "DS_ENV_FILE" in text
    assert chosen_hosts(hostfile, 2, None) == (("a", "b"), 1) and chosen_hosts(hostfile, 1, None) == (("a",), 2)
    programs(tmp_path / "poor", monkeypatch, ssh="exit 0")
    refused(launch(run_file, *options, 2), "through pdsh, which is not installed here")


def test_a_faulty_site_file_is_rejected_before_anything_is_written(run_file, tmp_path):
    text = (SITES / "slurm.toml").read_text()
    for old, new, said in (
        ("--nodes={nodes}", "--nodes={node}", r"job.directives\[1\] has the placeholder {node}, .*'nodes'"),
        ('kind = "gpu"', 'kind = "cuda"', r"mine.toml: die.kind 'cuda' is not known \(known: cpu, gpu\)"),
    ):
        path = tmp_path / "mine.toml"
        path.write_text(text.replace(old, new))
        refused(launch(run_file, "--site", path), said)
        assert not (run_file.parent / "run").exists()


def test_intel_gpus_are_devices_too(monkeypatch):
    """As far as this can be tested without one."""
    assert device().type == device_kind()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 12)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert device() == torch.device("xpu", 5) and BACKENDS[device_kind()] == "xccl"
    with pytest.raises(ConfigError, match="torch sees 12 of 13 GPUs"):
        check_devices(13)


def test_a_job_of_pbs_that_is_restarted_continues_or_begins(run_file, tmp_path, monkeypatch):
    """It is restarted by PBS with the same number or by itself with another one, with and without a run to continue."""
    text = (SITES / "aurora.toml").read_text()
    text = re.sub("launcher = '[^']*'", "launcher = 'echo ranks'", text).replace("module load frameworks", "true")
    site = tmp_path / "site.toml"
    site.write_text(text.replace("[job]\n", "[job]\nretries = 0\n").replace('kind = "gpu"', 'kind = "cpu"'))
    script_of(run_file, "--site", site, "--account", "a")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "mpiexec").write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
    (programs / "mpiexec").chmod(0o755)
    (tmp_path / "nodes").write_text(f"{os.uname().nodename}\n")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
    monkeypatch.setenv("USER", "me")
    record = tmp_path / "run" / "run.json"
    for number, again, begun, resumes in (
        ("17.pbs", "", False, False),
        ("17.pbs", "", False, False),
        ("17.pbs", "", True, True),
        ("18.pbs", "", True, False),
        ("19.pbs", "--resume", False, False),
        ("20.pbs", "--resume", True, True),
    ):
        record.unlink(missing_ok=True)
        if begun:
            record.write_text('{"train": {"steps": 3}}')
        monkeypatch.setenv("PBS_JOBID", number)
        monkeypatch.setenv("HYDRAZERO_RESUME", again)
        _, output = run_script(script_path(run_file))
        (words,) = [line for line in output.splitlines() if line.startswith("ranks ")]
        assert ("--resume" in words) == resumes, (number, again, begun, output)


@pytest.mark.ranks
def test_a_job_trains_from_copies_of_its_shards_and_reports_how_it_ended(run_file, tmp_path):
    """The script runs in a shell: with success, without space on the node, and for a run that exists already."""
    site = write_site(tmp_path, "retries = 0")
    result = launch(run_file, "--site", site, "--ranks-per-node", 1, "--set", "data.workers=0")
    assert result.exit_code == 0, result.output
    script = script_path(run_file)
    status, output = run_script(script)
    assert status == 0 and re.search(r"attempt 1 \(job \d+\): finished at step 3 of 3\n", output), output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["copies"].startswith(f"{tmp_path}/disk/hydrazero-")
    assert record["tasks"][0]["shards"].endswith("/molecules") and not list((tmp_path / "disk").iterdir())
    script.write_text(re.sub(r"--room \d+", f"--room {10**18}", script.read_text()))
    status, output = run_script(script)
    assert status == 1 and re.search(r"attempt 2 .*no rank has started: nodes failed the check", output)
    script.write_text(script.read_text().replace(f"--room {10**18}", "--room 1"))
    status, output = run_script(script)
    assert status == 1, output
    assert re.search(r"attempt 3 .*: rank 0 on \S+ ended with exit status 1 \(Error: .* holds a run", output)
