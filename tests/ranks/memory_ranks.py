"""Program of each rank in test_plan_ranks.py: peak memory and collectives of real steps, and those of the plan."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from bench.timing import status
from collective_count import Collectives
from structures import batch_of, facts, rattled_molecule, to_structure

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import ModelSettings
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.precision import precision_of
from hydrazero.trainer.config.sections import LossSection
from hydrazero.trainer.cost.device_memory import device_memory
from hydrazero.trainer.cost.step_cost import model_size
from hydrazero.trainer.cost.step_memory import StepMemory
from hydrazero.trainer.cost.traffic import Run, step_messages
from hydrazero.trainer.engine.losses import make_objective
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.engine.weight_average import WeightAverage
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.exit_status import exit_rank

TASKS, MICRO_BATCHES = 4, 2
SMALL = ModelSettings(encoder=EncoderSettings(features=16, layers=1, cutoff=4.0), head_features=16)


def megabytes(key: str) -> float:
    return status(key) / 1e3


def measured(name: str, settings: ModelSettings, counter: Collectives, *, warm_up: bool) -> dict[str, object]:
    from hydrazero.trainer.engine.engine import make_engine, train_step

    ds_config = deepspeed_config({"config": name, "gradient_accumulation_steps": MICRO_BATCHES}, steps=100)
    dtype = precision_of(ds_config).weights
    cutoff = settings.encoder.cutoff
    forces = torch.zeros(9, 3).numpy()
    structures = [to_structure(rattled_molecule(seed=n), energy=1.0, forces=forces) for n in range(4)]
    batch = batch_of(structures, list(range(4)), dtype=dtype, cutoff=cutoff)
    shape = BatchShape(structures=4, atoms=len(batch.numbers), slots=batch.slot_mask.numel())
    tasks = [facts(f"task{n}") for n in range(TASKS)]
    activations = 0.0 if warm_up else StepMemory(settings).bytes_of(shape)
    trim()
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    torch.manual_seed(0)
    model = AtomisticModel(settings, tasks).to(dtype).train()
    trained = ModelWithLoss(model, make_objective(model, LossSection(), [1.0] * TASKS))
    engine = make_engine(trained, ds_config)
    average, guard = WeightAverage(engine, 0.9), StepGuard(10, 0.0)
    for _ in range(3):
        counter.reset()
        train_step(engine, [batch] * MICRO_BATCHES, guard, stop=False)
        sent = dict(counter.bytes)
        average.update()
    peak = megabytes("VmHWM") - before
    run = Run(
        size=model_size(settings, tasks),
        ds_config=ds_config,
        tasks=TASKS,
        quantities=len(trained.objective.quantities),
        features=settings.encoder.features,
        balance_every=0,
        average=True,
    )
    memory = device_memory(run, distributed.ranks(), activations=activations, gpu=False, workers=0)
    planned: dict[str, float] = {}
    for message in step_messages(run, distributed.ranks()):
        planned[message.kind] = planned.get(message.kind, 0.0) + message.total
    held = {part: value / 1e6 for part, value in asdict(memory).items() if part not in ("stream", "host")}
    return {"peak": peak, "planned": sum(held.values()), "parts": held, "sent": sent, "planned_sent": planned}


def trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    out, features, head_features, *names = sys.argv[1:]
    # Freed memory returns to the system at once, so that the peak is the program's, not the allocator's.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    encoder = EncoderSettings(features=int(features), layers=3, cutoff=4.0)
    settings = ModelSettings(encoder=encoder, head_features=int(head_features))
    counter = Collectives()  # before DeepSpeed imports the functions of torch.distributed
    distributed.start_ranks()
    gc.freeze()  # imported objects are not searched again
    found = {}
    for name in names:
        measured(name, SMALL, counter, warm_up=True)  # loads what is loaded only once
        found[name] = measured(name, settings, counter, warm_up=False)
        trim()
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(found))
    distributed.wait_for_all()
    exit_rank(0)


if __name__ == "__main__":
    main()
