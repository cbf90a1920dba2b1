"""Start a script of the tests as several ranks with gloo, as a launcher would, and collect what they wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hydrazero.trainer.distributed import free_port

TESTS = Path(__file__).parent


def run_ranks(script: str, ranks: int, arguments: list[str], timeout: float = 300) -> None:
    """Run `tests/<script>` on `ranks` processes; fails with their output if one of them fails."""
    common = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(TESTS),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / script), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    failed = [output for process, output in zip(processes, outputs, strict=True) if process.returncode != 0]
    if failed:
        raise RuntimeError("a rank failed:\n" + "\n".join(failed))
