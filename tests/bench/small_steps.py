"""Time of whole training steps on few structures, and of the compiled graph in them: what the rest of a step costs.

The steps are those of a run on one rank: read by a worker, trained under ZeRO 1, counted, averaged. The arguments are
the number of steps and of threads.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_shards import write_bench_shards
from systems import CUTOFF, FEATURES, LAYERS, RADIAL_FUNCTIONS, octanols
from timing import hand_over

from hydrazero.models.inference.potential import structure_from_atoms
from hydrazero.shards.files import toml_text
from hydrazero.shards.graphs.graph import graph_sample
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.trainer.config.run_file import RunConfig, load_run_config
from hydrazero.trainer.engine import compiled_loss
from hydrazero.trainer.evaluation.interval import Interval
from hydrazero.trainer.loop import Trainer
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.exit_status import exit_rank
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.run_log import SilentLog
from hydrazero.trainer.setup import check_settings, compile_steps, engine_of, run_parts, weight_average_of

STRUCTURES = 5
"""Number of structures in a step."""
WARM_UP = 10


def run_file(folder: Path) -> Path:
    """Write shards of molecules with made labels, and a run file for them; return its path."""
    made = np.random.default_rng(0)
    structures = [
        replace(structure_from_atoms(atoms), energy=made.normal(), forces=made.normal(size=(len(atoms), 3)))
        for atoms in octanols()
    ]
    shards = folder / "shards"
    write_bench_shards(shards, structures, block=50)
    encoder = {"features": FEATURES, "layers": LAYERS, "radial_functions": RADIAL_FUNCTIONS, "cutoff": CUTOFF}
    samples = [graph_sample(structure, 0, CUTOFF) for structure in structures]
    batch = {
        "structures": STRUCTURES,
        "atoms": STRUCTURES * len(structures[0]),
        "slots": STRUCTURES * ROW_SLOTS * max(sample.rows for sample in samples),
    }
    path = folder / "run.toml"
    tables = {
        "run": {"out": str(folder / "run")},
        "tasks": [{"name": "bench", "shards": str(shards)}],
        "model": encoder,
        "batch": batch,
        "train": {"steps": 1_000_000, "compile": True, "average": 0.999, "keep_best": False},
        "deepspeed": {"config": "zero1"},
    }
    path.write_text(toml_text(tables), encoding="utf-8")
    return path


def timed_graphs() -> list[float]:
    """Let compiled graphs add the seconds of each call to the list that is returned."""
    seconds: list[float] = []
    compile_traced = compiled_loss.compile_traced

    def compile_timed(function: Any, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        graph = compile_traced(function, inputs)

        def run(tensors: Sequence[torch.Tensor]) -> Any:
            began = time.perf_counter()
            out = graph(tensors)
            seconds.append(time.perf_counter() - began)
            return out

        return run

    compiled_loss.compile_traced = compile_timed
    return seconds


def measure(config: RunConfig, steps: int) -> dict[str, list[float]]:
    """Return the seconds of each step, of its graph, and of its wait for the batch."""
    checked, graphs = check_settings(config), timed_graphs()
    engine = engine_of(config, checked)
    average = weight_average_of(engine, config.train.average)
    parts = run_parts(config, checked, engine, average, stop=StopRequest(0.0), log=SilentLog())
    trainer, interval = Trainer(Path(config.run.out), config.train, parts), Interval()
    compile_steps(engine)
    if engine.module.model.kernels is False:
        raise SystemExit("the kernels are missing.")
    engine.train()
    batches, whole, waits = iter(parts.stream), [], []
    for _ in range(WARM_UP + steps):
        waited, began = interval.waited, time.perf_counter()
        trainer.one_step(batches, interval)
        whole.append(time.perf_counter() - began)
        waits.append(interval.waited - waited)
    return {"whole": whole[WARM_UP:], "graph": graphs[WARM_UP:], "wait": waits[WARM_UP:]}


def main() -> None:
    steps, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        config = load_run_config(run_file(Path(folder)))
        distributed.within_ranks(10.0, lambda: hand_over(measure(config, steps)))
    exit_rank(0)


if __name__ == "__main__":
    main()
