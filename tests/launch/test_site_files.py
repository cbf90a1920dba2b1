"""Faulty site files: one sentence names the file and the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hydrazero.launch.job.site_file import load_site, site_names
from hydrazero.shards.errors import ConfigError

SITES = Path(__file__).parents[2] / "launch" / "sites"
FAULTS = [
    ('scheduler = "slurm"', 'scheduler = "slrum"', r"scheduler 'slrum' is not known \(did you mean 'slurm'\?\)"),
    ('kind = "gpu"', 'kind = "cuda"', r"die.kind 'cuda' is not known \(known: cpu, gpu\)"),
    ("tf32 = {", "tf31 = {", r"die.flops.tf31 is not known \(known: bf16, float32, float64, fp16, tf32\)"),
    ("[job]", "[job]\nretrys = 2", r"job.retrys is not known \(did you mean 'retries'\?\)"),
    ("[job]", "[job]\nretries = -1", r"job.retries is -1; it must be at least 0"),
    ("[job]", "[job]\nstop_before = 0", r"job.stop_before is 0; it must be above 0"),
    ("[job]", "[job]\nlimits = [{nodes = 4, hours = 1}, {nodes = 0, hours = 1}]", r"job.limits\[1\].nodes is 0; it"),
    ("launcher = ", "# ", r"job.launcher is missing"),
    ('oldest = "19.05"', 'oldest = "new"', r"job.oldest: 'new' is no version; give one such as '20.11'"),
    ("dies = 4", "dies = 0", r"nodes.dies is 0; it must be above 0"),
    ("cores = 64", "cores = -64", r"nodes.cores is -64; it must be above 0"),
    ("most = 1000", "most = 0", r"nodes.most is 0; it must be above 0"),
    ("hours = 24.0", "hours = inf", r"nodes.hours is inf; it must be a finite number"),
    ("memory = {value = 4e10", "memory = {value = 0", r"die.memory.value is 0; it must be above 0"),
    ("memory_bandwidth = {value = 1.555e12", "memory_bandwidth = {value = nan", r"die.memory_bandwidth.value is nan;"),
    ("bf16 = {value = 3.12e14", "bf16 = {value = -1", r"die.flops.bf16.value is -1; it must be above 0"),
    ("node_step = 2.0e-6", "node_step = -2.0e-6", r"collectives.ways\[0\].node_step is -2e-06; it must be at least 0"),
    ("bandwidth = {value = 6.25e09", "bandwidth = {value = 0.0", r"network.bandwidth.value is 0.0; it must be above 0"),
    ("opens = {value = 2.0e4", "opens = {value = 0", r"files.opens.value is 0; it must be above 0"),
    ('name = "OMP_NUM_THREADS"', 'name = "OMP THREADS"', r"variables\[0\].name: 'OMP THREADS' is no name of an env"),
]


@pytest.mark.parametrize(("old", "new", "said"), FAULTS, ids=[new.splitlines()[-1][:30] for _, new, _ in FAULTS])
def test_faulty_site_files(old, new, said, tmp_path):
    text = (SITES / "slurm.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {said}"):
        load_site(str(path))


def test_steps_without_latency_and_jobs_without_retries_are_allowed(tmp_path):
    text = (SITES / "slurm.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("node_step = 2.0e-6", "node_step = 0.0").replace("[job]", "[job]\nretries = 0", 1))
    site = load_site(str(path))
    assert site.collectives.ways[0].node_step == 0 and site.job.retries == 0


@pytest.mark.parametrize("name", site_names())
def test_sites_of_the_package_pass(name):
    assert load_site(name).name == name
