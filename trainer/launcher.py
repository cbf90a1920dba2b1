"""Starting several ranks on this machine with the deepspeed launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydrazero.trainer.distributed import free_port


def launch_ranks(
    run_file: Path, ranks: int, overrides: Sequence[str], resume: bool, options: Sequence[str] = ()
) -> int:
    """Train with `ranks` processes under the deepspeed launcher; returns its exit status.

    `options` are more of those that hydrazero.trainer.train takes.
    """
    import torch

    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(cores // ranks, 1)))
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), "--log_level", "error"]
    command += ["--module", "hydrazero.trainer.train", str(run_file)]
    for override in overrides:
        command += ["--set", override]
    if resume:
        command.append("--resume")
    command += options
    return subprocess.run(command, env=environment, check=False).returncode
