"""The README: its walk through convert, train, evaluate, export, screen and launch runs as it stands (fewer steps)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hydrazero.trainer.demo.labels import make_demo_sources

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
MOST_WORDS = 1200


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_is_short():
    assert len(README.split()) < MOST_WORDS


def test_links_of_the_readme_lead_somewhere():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_runs(tmp_path):
    make_demo_sources(tmp_path / "runs" / "demo" / "sources", counts={"emt": 60, "tersoff": 40})
    (run_file,) = blocks("toml")
    assert "steps = 300" in run_file
    (tmp_path / "runs" / "first.toml").write_text(run_file.replace("steps = 300", "steps = 4"))
    shown = [line for block in blocks("console") for line in block.splitlines()]
    lines = [line.removeprefix("$ ") for line in shown if line.startswith("$ hydrazero ")]
    assert len(lines) >= 7
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    for line in lines:
        result = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
    for code in blocks("python"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=100)
    for name in ("model.safetensors", "screen.parquet", "evaluation.json", "launch/job.sh"):
        assert (tmp_path / "runs" / "first" / name).is_file()
