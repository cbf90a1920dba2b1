"""Seconds per eager step of our PaiNN, energy and forces, training and inference."""

from __future__ import annotations

import sys

import numpy as np
import torch
from systems import CUTOFF, FEATURES, LAYERS, RADIAL_FUNCTIONS, SYSTEMS, THREADS
from timing import hand_over, step_seconds

from hydrazero.models.atomistic import AtomisticModel, ModelSettings
from hydrazero.models.encoder import EncoderSettings
from hydrazero.models.potential import structure_from_atoms
from hydrazero.models.task_facts import TaskFacts
from hydrazero.shards.graph import collate, graph_sample, shape_holding


def main() -> None:
    repeats = int(sys.argv[1])
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    encoder = EncoderSettings(features=FEATURES, layers=LAYERS, radial_functions=RADIAL_FUNCTIONS, cutoff=CUTOFF)
    facts = TaskFacts(name="bench", reference_energies={}, scale=1.0, elements=["C", "Cu", "H"])
    model = AtomisticModel(ModelSettings(encoder=encoder), [facts])
    seconds = {}
    for name, make in SYSTEMS.items():
        samples = [graph_sample(structure_from_atoms(atoms), 0, CUTOFF) for atoms in make()]
        batch = collate(samples, shape_holding(samples), torch.float32)

        def train(batch=batch) -> None:
            model.zero_grad()
            predictions = model.train()(batch)
            (predictions.interaction.square().mean() + predictions.forces.square().mean()).backward()

        def infer(batch=batch) -> None:
            model.eval()(batch)

        seconds[f"train_{name}"] = step_seconds(train, repeats)
        seconds[f"infer_{name}"] = step_seconds(infer, repeats)
        assert np.isfinite(float(model.eval()(batch).interaction.sum()))
    hand_over(seconds)


if __name__ == "__main__":
    main()
