"""Screening from shards to Parquet: structures/s with all heads, and the model's share of the time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from bench_shards import write_bench_shards
from ours import MANY_HEADS, model_of
from systems import SCREENED, THREADS
from timing import hand_over

from hydrazero.models import Potential
from hydrazero.models.inference.potential import structure_from_atoms
from hydrazero.models.screening import ScreenPlan, ScreenSettings, ScreenSummary, ShardSource, screen
from hydrazero.shards.block import BLOCK_STRUCTURES

COUNTS = {
    ("molecules", "energy"): 20_480,
    ("molecules", "forces"): 10_240,
    ("metals", "energy"): 6_144,
    ("metals", "forces"): 3_072,
}
"""Number of structures to screen per case, which takes about ten seconds each."""


def run(root: Path, name: str, kind: str, heads: int) -> ScreenSummary:
    """Screen a system by all heads of a model, with a new output in each call; return the summary."""
    potential = Potential(model_of(heads), "cuda" if torch.cuda.is_available() else "cpu")
    tasks = tuple(potential.tasks)
    settings = ScreenSettings(tasks=tasks, forces=tasks[:1] if kind == "forces" else ())
    out = Path(tempfile.mkdtemp(dir=root)) / "out"
    return screen(potential, [ShardSource(root / f"{name}-{kind}")], out, settings, ScreenPlan(compile_after=0.0))


def main() -> None:
    torch.set_num_threads(THREADS)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for (name, kind), count in COUNTS.items():
            few = [structure_from_atoms(atoms) for atoms in SCREENED[name]()]
            write_bench_shards(
                root / f"{name}-{kind}", [few[number % len(few)] for number in range(count)], BLOCK_STRUCTURES
            )
            for label, heads in (("all", MANY_HEADS), ("one", 1)):
                if (label, kind) == ("one", "forces"):
                    continue
                summary = run(root, name, kind, heads)
                steady = summary.seconds - summary.start_seconds
                key = f"screen_{kind}_{name}_{label}"
                seconds.setdefault(key, []).append(steady / count)
                seconds.setdefault(f"{key}_model", []).append(summary.model_seconds / steady)
    hand_over(seconds)


if __name__ == "__main__":
    main()
