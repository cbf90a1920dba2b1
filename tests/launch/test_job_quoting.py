"""Folders whose names contain spaces and special characters of shells and schedulers, in the scripts of every site."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launched import SITES, launch, refused, run_script, write_site
from torture import make_data, write_run

from hydrazero.launch.job.schedulers import slurm_quoted
from hydrazero.launch.job.site_file import load_site, site_names

NAME = 'a "run" of $HOME `id`; it\'s 100% # #SBATCH & #PBS'


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("quoting"))


@pytest.fixture
def run_file(data, tmp_path) -> Path:
    """A run in a folder whose name contains such characters."""
    path = write_run(tmp_path, data, 3)
    path.write_text(re.sub("out = .*", lambda _: f"out = {json.dumps(str(tmp_path / NAME))}", path.read_text()))
    return path


def script_in(folder: Path) -> Path:
    return folder / NAME / "launch" / "job.sh"


def sbatch_words(line: str) -> list[str]:
    """Words of a directive by the rules of sbatch: backslashes and both quotes, a `#` begins a comment."""
    words, word, quote, escaped = [], "", "", False
    for letter in f"{line} ":
        if escaped:
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if letter == quote else (word + letter, quote)
        elif letter == "#":
            break
        elif letter in "\"'":
            quote = letter
        elif letter.isspace():
            words, word = [*words, word] if word else words, ""
        else:
            word += letter
    assert not quote
    return words


@pytest.mark.parametrize("site", site_names())
def test_scripts_are_read_as_they_are_meant(site, run_file, tmp_path):
    options = ["--site", site, "--account", "a b", *(["--queue", "x'y"] if site == "aurora" else [])]
    assert launch(run_file, *options).exit_code == 0
    text = script_in(tmp_path).read_text()
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    (value,) = re.findall(r"^launch=.*$", text, flags=re.MULTILINE)
    assert shlex.split(value) == [f"launch={tmp_path / NAME / 'launch'}"]
    prefix = {"slurm": "#SBATCH ", "pbs": "#PBS "}.get(load_site(site).scheduler, "#none ")
    lines = [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]
    output = f"{tmp_path / NAME / 'launch' / 'job'}"
    name = re.sub(r"[^\w.+-]", "_", NAME)
    if prefix == "#SBATCH ":
        words = [word for line in lines for word in sbatch_words(line)]
        assert words == [word for line in lines for word in shlex.split(line)]
        assert f"--output={output.replace('%', '%%')}-%j.out" in words
        assert {"--account=a b", f"--job-name={name}"} <= set(words)
    elif prefix == "#PBS ":
        options = [shlex.split(line) for line in lines]
        assert [["-o", f"{output}.out"], ["-A", "a b"], ["-q", "x'y"], ["-N", name]] == [
            next(words for words in options if words[0] == flag) for flag in ("-o", "-A", "-q", "-N")
        ]
        assert not any("\\" in line for line in lines)  # qsub knows none


def test_what_sbatch_reads_is_what_was_meant():
    for text in (NAME, "plain", "a\\b", "", "%j"):
        assert sbatch_words(f"--x={slurm_quoted(text)}") == [f"--x={text.replace('%', '%%')}"]


def test_a_job_runs_in_such_a_folder(run_file, tmp_path):
    """Texts of the site are quoted according to their place: between quotes or without."""
    site = write_site(tmp_path, 'setup = ["echo setup {output}"]', "retries = 0", "health = 'echo health {output}'")
    text = re.sub("launcher = .*", "launcher = 'echo ranks {output}'", site.read_text())
    site.write_text(text + '[[variables]]\nname = "HERE"\nvalue = "{output} ${HERE:-}"\nreason = "To be seen."\n')
    assert launch(run_file, "--site", site, "--ranks-per-node", 1).exit_code == 0
    script = script_in(tmp_path)
    script.write_text(script.read_text().replace("received=\n", 'received=\necho "here $HERE"\n', 1))
    status, output = run_script(script)
    job, attempt = tmp_path / NAME / "launch" / "job", tmp_path / NAME / "launch" / "attempt-0001"
    assert status == 1 and f"\nhere {job} \n" in output and f"health {job}\n" in output, output
    assert output.startswith(f"setup {job}\n") and f"\nranks {job} --attempt {attempt} " in output, output
    assert (attempt / "verdict.json").exists()


def test_names_that_schedulers_do_not_accept_and_texts_without_a_value(run_file, data, tmp_path):
    for name in ("a\\b", "a\nb"):
        refused(launch(run_file, "--site", "slurm", "--set", f"run.out={json.dumps(name)}"), "no backslash or line")
        assert not Path(name).exists()
    text = (SITES / "slurm.toml").read_text().replace("launcher = 'srun", "launcher = 'srun --account={account}")
    (tmp_path / "site.toml").write_text(text)
    refused(launch(run_file, "--site", tmp_path / "site.toml"), "job.launcher has a placeholder for which this job h")
