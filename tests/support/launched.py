"""Helpers for tests that launch runs: they write job scripts, read them and run them in a shell."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from click.testing import CliRunner, Result

from hydrazero.launch.cli.main import main

SITES = Path(__file__).parents[2] / "launch" / "sites"
LAUNCHER = "launcher = 'RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 {python} -u -m hydrazero.launch.node.rank'"


def launch(run_file: Path, *options: object) -> Result:
    """Run `hydrazero launch` and return its result."""
    return CliRunner().invoke(main, ["launch", str(run_file), *map(str, options)])


def script_path(run_file: Path) -> Path:
    """Return the path of the job script of a run whose folder `run` is beside the run file."""
    return run_file.parent / "run" / "launch" / "job.sh"


def script_of(run_file: Path, *options: object) -> str:
    """Return the job script; fail if anything else was written."""
    result = launch(run_file, *options)
    assert result.exit_code == 0, result.output
    path = script_path(run_file)
    assert result.output == f"{path}\n"
    assert [each for each in (run_file.parent / "run").rglob("*") if each.is_file()] == [path]
    return path.read_text()


def refused(result: Result, said: str) -> None:
    """Fail unless a command ended with exactly one sentence that matches `said`."""
    assert result.exit_code == 1, result.output
    assert re.search(said, result.output), result.output
    assert re.fullmatch(r"Error: [^\n]*[.?]\n", result.output), result.output


def write_site(folder: Path, *job: str) -> Path:
    """Write a site file without a scheduler and return its path.

    The node is this host, its local disk is a folder, and `job` are lines of the table [job].
    """
    text = (SITES / "local.toml").read_text().split("[job]")[0]
    text = re.sub(r"^node_local = .*\n", f'node_local = "{folder}/disk"\n', text, flags=re.MULTILINE)
    path = folder / "site.toml"
    path.write_text("\n".join([text, "[job]", LAUNCHER, *job, ""]))
    return path


def start_script(script: Path) -> subprocess.Popen[str]:
    """Start a job script in the environment that a scheduler would give it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", str(script)], stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)


def run_script(script: Path) -> tuple[int, str]:
    """Run a job script to its end; return its exit status and output."""
    process = start_script(script)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output
