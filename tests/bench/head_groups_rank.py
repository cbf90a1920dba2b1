"""Program of each rank: steps with heads everywhere and in groups, alternately; reports their results and costs.

The arguments are the number of steps and the names of cases, by default all.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "ranks", "support"))
from bench.head_groups import CASES, make_sides, parameters_of, weight_differences
from bench.timing import hand_over
from collective_count import Collectives

from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.exit_status import exit_rank

Measurements = dict[str, list[float]]


def compare(name: str, steps: int, counter: Collectives) -> Measurements:
    """Return the measurements of this rank in a case: lists with an entry per step and side, and single numbers."""
    sides = make_sides(CASES[name])
    found: Measurements = {}
    gc.collect()
    for number in range(steps):
        for side_name, side in sides.items():
            distributed.wait_for_all()
            counter.reset()
            began = time.perf_counter()
            processor = time.process_time()
            step = side.step(number)
            of_step = {
                **asdict(step),
                "step_processor": time.process_time() - processor,
                "step": time.perf_counter() - began,
                "sent": float(counter.bytes["all_reduce"]),
                "states": float(side.state_bytes()),
            }
            for key, value in of_step.items():
                found.setdefault(f"{name}_{side_name}_{key}", []).append(value)
    for side_name, side in sides.items():
        found[f"{name}_{side_name}_parameters"] = [float(count) for count in parameters_of(side.model)]
    for kind, difference in weight_differences(sides).items():
        found[f"{name}_{kind}_difference"] = [difference]
    return found


def maxima(everybody: list[Measurements]) -> Measurements:
    """Return the maximum over all ranks per step, and the maximum of their processor times over the mean."""
    found: Measurements = {}
    for name in everybody[0]:
        by_step = list(zip(*(rank[name] for rank in everybody), strict=True))
        found[name] = [max(of_ranks) for of_ranks in by_step]
        if name.endswith("_step_processor"):
            imbalance = [max(of_ranks) * len(of_ranks) / sum(of_ranks) for of_ranks in by_step]
            found[name.replace("_step_processor", "_imbalance")] = imbalance
    return found


def main() -> None:
    steps, names = int(sys.argv[1]), sys.argv[2:] or list(CASES)
    counter = Collectives()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    distributed.start_ranks()
    gc.freeze()
    found: Measurements = {}
    for name in names:
        found |= compare(name, steps, counter)
    everybody = distributed.gather_to_first(found)
    if distributed.rank() == 0:
        hand_over(maxima(everybody))
    distributed.wait_for_all()
    exit_rank(0)


if __name__ == "__main__":
    main()
