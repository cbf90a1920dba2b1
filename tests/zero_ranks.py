"""Run by test_zero.py on every rank: a few steps under each ZeRO stage, the weights and losses into a JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from structures import CUTOFF, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.shards.graph import BatchShape, GraphBatch, collate, graph_sample
from hydrazero.shards.structure import Structure
from hydrazero.trainer import distributed
from hydrazero.trainer.config import LossSection
from hydrazero.trainer.losses import Objective, make_objective
from hydrazero.trainer.step_guard import StepGuard
from hydrazero.trainer.trained_model import TrainedModel
from hydrazero.trainer.weight_average import WeightAverage

STEPS = 4
TASKS = 3
OPTIMIZER = {"lr": 1e-2, "betas": [0.9, 0.999], "weight_decay": 1e-3}
CLIP = 0.5


def labelled(atoms, seed: int):
    generator = torch.Generator().manual_seed(seed)
    forces = torch.randn(len(atoms), 3, generator=generator, dtype=torch.float64).numpy()
    # Total energies near the references of tests/structures.py, so that the remainder is of order one.
    reference = {"H": -13.5, "C": -1030.0, "O": -2040.0, "Na": -4400.0, "Cl": -12500.0}
    energy = sum(reference[s] for s in atoms.get_chemical_symbols()) + 0.3 * seed
    return to_structure(atoms, f"made#{seed}", energy=energy, forces=forces)


def micro_batches(rank: int, dtype: torch.dtype) -> list[GraphBatch]:
    """Two micro-batches a rank; tasks 0 and 1 are on rank 0 alone, task 2 on rank 1 alone (and 1 on both once)."""
    if rank == 0:
        first = [labelled(rattled_molecule(seed=1), 1), labelled(rattled_molecule("H2O", seed=2), 2)]
        return [batch(first, [0, 0], dtype), batch([labelled(rattled_crystal(3), 3)], [1], dtype)]
    last = [labelled(rattled_molecule(seed=5), 5), labelled(rattled_crystal(6), 6)]
    return [batch([labelled(rattled_molecule("CH4", seed=4), 4)], [2], dtype), batch(last, [2, 1], dtype)]


def batch(structures: list[Structure], tasks: list[int], dtype: torch.dtype) -> GraphBatch:
    """All of one shape, so that a compiled step is compiled once."""
    samples = [graph_sample(structure, task, CUTOFF) for structure, task in zip(structures, tasks, strict=True)]
    return collate(samples, BatchShape(structures=3, atoms=24, slots=512), dtype)


def objective(model: AtomisticModel) -> Objective:
    loss = LossSection(kind="huber", energy_weight=2.0, forces_weight=1.0, stress_weight=0.0)
    return make_objective(model, loss, [1.0, 0.3, 2.0])


AVERAGE = 0.6


def ds_config(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {**OPTIMIZER, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }


def train_under(stage: int, compiled: bool = False) -> dict:
    import deepspeed

    from hydrazero.trainer.engine import make_engine, train_step

    model = small_model(tasks=TASKS, dtype=torch.float32).train()
    trained = TrainedModel(model, objective(model))
    if compiled:
        trained.compile_steps()
    engine = make_engine(trained, ds_config(stage))
    batches = micro_batches(distributed.rank(), torch.float32)
    average, guard = WeightAverage(engine, AVERAGE), StepGuard(10, 0.0)
    losses = []
    for _ in range(STEPS):
        losses.append(train_step(engine, batches, guard, stop=False).loss)
        average.update()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        weights = flat(model)
    with average.applied(), deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        averaged = flat(model)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        assert flat(model) == weights
    again = train_step(engine, batches, guard, stop=False).loss
    return {"losses": [*losses, again], "weights": weights, "averaged": averaged}


def flat(model: AtomisticModel) -> dict[str, list[float]]:
    return {name: p.detach().float().flatten().tolist() for name, p in model.named_parameters()}


def main() -> None:
    distributed.start_ranks()
    results = {str(stage): train_under(stage) for stage in (0, 1, 2, 3)}
    results |= {f"{stage} compiled": train_under(stage, compiled=True) for stage in (1, 2)}
    if distributed.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    distributed.wait_for_all()
    distributed.exit_rank(0)


if __name__ == "__main__":
    main()
