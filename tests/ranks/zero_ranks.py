"""Program of each rank in test_zero.py: a few steps in each ZeRO stage and precision, with results in a JSON file."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import torch
from structures import CUTOFF, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.shards.graphs.graph import BatchShape, GraphBatch, collate, graph_sample
from hydrazero.shards.structure import Structure
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.precision import precision_of
from hydrazero.trainer.config.sections import LossSection
from hydrazero.trainer.engine.losses import Objective, make_objective
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.engine.weight_average import WeightAverage
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.exit_status import exit_rank

STEPS = 4
BROKEN = 2
"""Step before which a step with non-finite labels on one rank is run, which must not change anything."""
TASKS = 3
OPTIMIZER = {"lr": 1e-2, "betas": [0.9, 0.999], "weight_decay": 1e-3}
CLIP = 0.5
AVERAGE = 0.6
FLOAT32 = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
COMPILED = ("zero1 compiled", "zero2 compiled")
"""Names with a model of one layer in float32: compilation takes most of the time, and more layers test nothing new."""
FLOAT64 = ("zero1_fp64", "zero2_fp64", "zero3_fp64", "zero2_offload_fp64", "zero3_offload_fp64")
AUTOCAST = (
    "zero0_bf16_autocast",
    "zero1_bf16_autocast",
    "zero2_bf16_autocast",
    "zero3_bf16_autocast",
    "zero2_offload_bf16_autocast",
    "zero3_offload_bf16_autocast",
)
BF16 = ("zero1_bf16", "zero2_bf16", "zero3_bf16", "zero2_offload_bf16", "zero3_offload_bf16")


def labelled(atoms, seed: int):
    generator = torch.Generator().manual_seed(seed)
    forces = torch.randn(len(atoms), 3, generator=generator, dtype=torch.float64).numpy()
    # Total energies near the references of tests/support/structures.py, so that the remainder is of order one.
    reference = {"H": -13.5, "C": -1030.0, "O": -2040.0, "Na": -4400.0, "Cl": -12500.0}
    energy = sum(reference[s] for s in atoms.get_chemical_symbols()) + 0.3 * seed
    return to_structure(atoms, f"made#{seed}", energy=energy, forces=forces)


def micro_batches(rank: int, dtype: torch.dtype) -> list[GraphBatch]:
    """Return two micro-batches of a rank: task 0 is only on rank 0, task 2 only on rank 1, and task 1 on both."""
    if rank == 0:
        first = [labelled(rattled_molecule(seed=1), 1), labelled(rattled_molecule("H2O", seed=2), 2)]
        return [batch(first, [0, 0], dtype), batch([labelled(rattled_crystal(3), 3)], [1], dtype)]
    last = [labelled(rattled_molecule(seed=5), 5), labelled(rattled_crystal(6), 6)]
    return [batch([labelled(rattled_molecule("CH4", seed=4), 4)], [2], dtype), batch(last, [2, 1], dtype)]


def batch(structures: list[Structure], tasks: list[int], dtype: torch.dtype) -> GraphBatch:
    """Return a batch of a shape that all batches share, so that a compiled step is compiled once."""
    samples = [graph_sample(structure, task, CUTOFF) for structure, task in zip(structures, tasks, strict=True)]
    return collate(samples, BatchShape(structures=3, atoms=24, slots=512), dtype)


def objective(model: AtomisticModel) -> Objective:
    loss = LossSection(kind="huber", energy_weight=2.0, forces_weight=1.0, stress_weight=0.0)
    return make_objective(model, loss, [1.0, 0.3, 2.0])


def ds_config(name: str) -> dict:
    """Return a packaged configuration with settings that take effect within a few steps."""
    changes = {
        "config": name,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": CLIP,
        "optimizer": {"params": OPTIMIZER},
        # With the default threshold, ZeRO 3 would partition none of these small weights.
        "zero_optimization": {"stage3_param_persistence_threshold": 0 if "offload" not in name else 300},
    }
    document = deepspeed_config(changes, STEPS)
    del document["scheduler"]
    return document


def train_under(name: str, folder: Path) -> dict:
    from hydrazero.trainer.checkpoint.model_of_run import weights_in
    from hydrazero.trainer.engine.engine import make_engine, train_step
    from hydrazero.trainer.engine.zero_layout import layout_of

    config = ds_config(name.removesuffix(" compiled"))
    dtype = precision_of(config).weights
    model = small_model(tasks=TASKS, dtype=torch.float32, layers=1 if name in COMPILED else 2).to(dtype).train()
    trained = ModelWithLoss(model, objective(model))
    engine = make_engine(trained, config)
    if name in COMPILED:
        trained.compile_steps()
    batches = micro_batches(distributed.rank(), dtype)
    bad = copy.copy(batches[-1])
    if distributed.rank() == 1:
        bad.energy = bad.energy * math.nan
    average, guard = WeightAverage(engine, AVERAGE), StepGuard(10, 0.0)
    losses, norms = [], []
    for step in range(STEPS):
        if step == BROKEN:
            broken = train_step(engine, [*batches[:-1], bad], guard, stop=False)
            assert broken.skipped and not broken.rescaled and math.isnan(broken.loss)
        result = train_step(engine, batches, guard, stop=False)
        assert not result.skipped
        losses.append(result.loss)
        norms.append(engine.get_global_grad_norm())
        average.update()
    named = {key: p for key, p in engine.module.named_parameters() if p.requires_grad}
    weights = {key: layout_of(engine).full_weight(p) for key, p in named.items()}
    rounded = whole_model(engine)
    averaged = average.full()
    with average.applied():
        rounded_average = whole_model(engine)
    assert all(torch.equal(whole_model(engine)[key], rounded[key]) for key in named)  # restored
    for key, p in named.items():
        assert weights[key].dtype == averaged[key].dtype == dtype  # float32 or float64, never lower
        torch.testing.assert_close(rounded[key], weights[key].to(p.dtype), rtol=0, atol=0)
        torch.testing.assert_close(rounded_average[key], averaged[key].to(p.dtype), rtol=0, atol=0)
    engine.save_checkpoint(str(folder / name), tag="step", save_latest=False)
    average.save(folder / name / "step")
    distributed.wait_for_all()
    stored = weights_in(folder / name / "step", layout_of(engine).partition())
    average.load(folder / name / "step", average.steps)
    assert all(torch.equal(value, averaged[key]) for key, value in average.full().items())
    for key, value in weights.items():
        torch.testing.assert_close(stored[key.removeprefix("model.")], value, rtol=0, atol=0)
    again = train_step(engine, batches, guard, stop=False).loss
    return {
        "losses": [*losses, again],
        "norms": [None if norm is None else float(norm) for norm in norms],
        "weights": flat(weights),
        "averaged": flat(averaged),
    }


def whole_model(engine) -> dict[str, torch.Tensor]:
    """Return the weights with which the model computes."""
    import deepspeed

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def flat(weights: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: value.detach().double().flatten().tolist() for name, value in weights.items()}


def main() -> None:
    distributed.start_ranks()
    names = sys.argv[2:] or [*FLOAT32, *COMPILED, *FLOAT64, *AUTOCAST, *BF16]
    results = {name: train_under(name, Path(sys.argv[1])) for name in names}
    if distributed.rank() == 0:
        (Path(sys.argv[1]) / "result.json").write_text(json.dumps(results))
    distributed.wait_for_all()
    exit_rank(0)


if __name__ == "__main__":
    main()
