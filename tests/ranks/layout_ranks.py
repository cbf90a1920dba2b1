"""Program of each rank in test_recovery.py: checkpoints pass between engines that partition them differently.

Two ranks train, and pass a checkpoint through all ZeRO stages; then one rank loads some of them. The state of each
engine must be identical to what was saved, bit for bit. The losses of the steps after it are recorded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from structures import small_model
from zero_ranks import micro_batches, objective

from hydrazero.trainer.checkpoint.folders import Retention, folder_of
from hydrazero.trainer.checkpoint.save_load import load_checkpoint, read_state, save_checkpoint
from hydrazero.trainer.checkpoint.zero_files import ZeroFiles
from hydrazero.trainer.engine.engine import make_engine, train_step
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.engine.parameter_groups import freeze
from hydrazero.trainer.engine.partition import partition_in
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.engine.weight_average import WeightAverage
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.exit_status import exit_rank

RETENTION = Retention(last=9, best=None)
STAGES = (1, 0, 2, 3, 0, 3, 1)
"""Stages through which two ranks pass the checkpoint, in both directions between no ZeRO and each stage."""
EMPTY = ("interval", "stream", "balance", "guard", "random")
STATE = {"step": 1, "best": None, "stale": 0, "skipped_structures": 0, **{part: {} for part in EMPTY}}
"""State of a run whose engine alone is tested."""


def ds_config(stage: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "fp64": {"enabled": dtype == torch.float64},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2 // distributed.ranks(),
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupPlateauLR", "params": {"warmup_num_steps": 9}},
        # With this threshold, ZeRO 3 partitions some parameters and keeps others complete.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 50},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }


class Rank:
    """An engine with its average of the weights and its checkpoints."""

    def __init__(self, stage: int, dtype: torch.dtype) -> None:
        model = small_model(tasks=3, dtype=dtype).train()
        freeze(model, ["*embedding.elements*"])
        if stage != 1:
            with torch.no_grad():
                next(p for p in model.parameters() if not p.requires_grad).zero_()  # must come from the checkpoint
        self.dtype = dtype
        self.engine = make_engine(ModelWithLoss(model, objective(model)), ds_config(stage, dtype))
        self.average = WeightAverage(self.engine, 0.6)

    def step(self) -> float:
        of_ranks = (0, 1) if distributed.ranks() == 1 else (distributed.rank(),)
        batches = [micro_batches(rank, self.dtype)[0] for rank in of_ranks]
        loss = train_step(self.engine, batches, StepGuard(10, 0.0), stop=False).loss
        self.average.update()
        return loss

    def save(self, folder: Path) -> None:
        reason = save_checkpoint(self.engine, folder, dict(STATE), self.average, RETENTION)
        if reason is not None:
            raise RuntimeError(reason)

    def load(self, folder: Path) -> None:
        load_checkpoint(self.engine, folder_of(folder, 1), self.average)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return everything in a checkpoint by name: weights, moments, step counts, frozen parameters, the schedule."""
    checkpoint = folder_of(folder, 1)
    layout = partition_in(read_state(checkpoint)["layout"])
    saved = ZeroFiles(checkpoint, layout)
    found = {
        f"{name} {key}": saved.read(name, 0, place.size, key).double()
        for name, place in layout.places.items()
        for key in (None, "exp_avg", "exp_avg_sq")
    }
    found |= {f"{name} step": saved.state_like(name)["step"] for name in layout.places}
    found |= {f"{name} untrained": value.double() for name, value in saved.untrained()}
    rates = [group["lr"] for group in saved.groups()] + [group["weight_decay"] for group in saved.groups()]
    return found | {"rates": torch.tensor(rates), "taken": torch.tensor(saved.facts["lr_scheduler"]["taken"])}


def differing(folder: Path, other: Path) -> list[str]:
    one, two = tensors(folder), tensors(other)
    return sorted(set(one) ^ set(two)) + [name for name in one if name in two and not torch.equal(one[name], two[name])]


def two_ranks(root: Path) -> dict[str, Any]:
    first = Rank(STAGES[0], torch.float32)
    for _ in range(3):
        first.step()
    first.save(root / "0")
    result: dict[str, Any] = {"losses": [first.step() for _ in range(3)], "after": {}, "differing": {}}
    for number, stage in enumerate(STAGES[1:], start=1):
        rank = Rank(stage, torch.float64 if number == 3 else torch.float32)  # float64 represents float32 exactly
        rank.load(root / str(number - 1))
        rank.save(root / str(number))
        name = f"{number}: stage {STAGES[number - 1]} to {stage}"
        result["after"][name] = [rank.step() for _ in range(3)]
        result["differing"][name] = differing(root / "0", root / str(number))
    return result


def one_rank(root: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"after": {}, "differing": {}}
    for stage, source in ((0, "0"), (3, "0"), (1, "3"), (2, "4")):
        rank = Rank(stage, torch.float32)
        rank.load(root / source)
        rank.save(root / f"one-{stage}")
        name = f"{source} to one rank, stage {stage}"
        result["after"][name] = [rank.step() for _ in range(3)]
        result["differing"][name] = differing(root / "0", root / f"one-{stage}")
    return result


def main() -> None:
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.start_ranks()
    result = two_ranks(root) if distributed.ranks() == 2 else one_rank(root)
    if distributed.rank() == 0:
        out.write_text(json.dumps(result))
    distributed.wait_for_all()
    exit_rank(0)


if __name__ == "__main__":
    main()
