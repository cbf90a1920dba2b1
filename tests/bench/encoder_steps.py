"""Time of a compiled training step of the encoders with fused sums: PaiNN, TensorNet and LACE."""

from __future__ import annotations

import sys
from typing import Any

import torch
from ours import Steps, batch_of, model_of
from systems import CUTOFF, FEATURES, LAYERS, RADIAL_FUNCTIONS, SYSTEMS, THREADS
from timing import hand_over, step_seconds

SAME = {"features": FEATURES, "layers": LAYERS, "radial_functions": RADIAL_FUNCTIONS, "cutoff": CUTOFF}
ENCODERS: dict[str, dict[str, Any]] = {
    "painn": {"encoder": "painn", **SAME},
    "tensornet": {"encoder": "tensornet", **SAME},
    "lace_small": {"encoder": "lace", "features": 64, "layers": 2, "radial_functions": 8, "cutoff": CUTOFF},
}
"""The settings of each encoder; those of LACE are of its size 'small'."""


def main() -> None:
    """Measure all encoders in turn on each system."""
    rounds = int(sys.argv[1])
    torch.set_num_threads(THREADS)
    seconds: dict[str, list[float]] = {}
    for system in SYSTEMS:
        batch = batch_of(system, 1)
        steps = {name: Steps(model_of(1, **settings), batch, compiled=True) for name, settings in ENCODERS.items()}
        for _ in range(rounds):
            for name, each in steps.items():
                seconds.setdefault(f"{name}_{system}", []).extend(step_seconds(each.train, 3))
    hand_over(seconds)


if __name__ == "__main__":
    main()
