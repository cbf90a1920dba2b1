"""The files that DeepSpeed writes into a checkpoint: the one place that knows their names and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.safe_load import safe_load
from hydrazero.trainer.engine.partition import Partition
from hydrazero.trainer.engine.zero_layout import STATE_KEYS

MODEL_FILE = "mp_rank_00_model_states.pt"
"""Model and counts of steps, under ZeRO 0 to 2."""
MODEL_PART_FILE = "zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
"""The same under ZeRO 3, where each rank writes what it holds."""
OPTIMIZER_FILE = "*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
"""Share of a rank in the optimizer's weights and state, under ZeRO 1 to 3; the beginning depends on the precision."""
WEIGHT_KEYS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""Key of the optimizer's weights: under ZeRO 1 and 2, and under ZeRO 3."""


class ZeroFiles:
    """The optimizer's weights and state in a checkpoint's files, which are read only as far as they are needed."""

    def __init__(self, folder: Path, partition: Partition) -> None:
        self.folder, self.partition = folder, partition
        first = MODEL_PART_FILE.format(rank=0) if partition.stage == 3 else MODEL_FILE
        self.facts = safe_load(folder / first)
        """Document of rank 0, with what DeepSpeed keeps beside weights: counts of steps, schedule."""
        self._opened: dict[int, tuple[list[Tensor], dict[str, Any]]] = {}

    def of_rank(self, number: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Return a rank's flat tensors of weights, and the state of its optimizer."""
        if number not in self._opened:
            self._opened[number] = self._open(number)
        return self._opened[number]

    def _open(self, number: int) -> tuple[list[Tensor], dict[str, Any]]:
        if self.partition.stage == 0:
            return [self.facts["module"][name] for name in self.partition.places], self.facts["optimizer"]
        found = list(self.folder.glob(OPTIMIZER_FILE.format(rank=number)))
        if len(found) != 1:
            raise ConfigError(f"{self.folder} has {len(found)} files of the optimizer of rank {number}, not one.")
        (path,) = found
        document = safe_load(path)["optimizer_state_dict"]
        flats, inner = (next(document[key] for key in keys if key in document) for keys in (WEIGHT_KEYS, STATE_KEYS))
        return flats, inner

    def read(self, name: str, begin: int, end: int, key: str | None) -> Tensor:
        """Return the elements [begin, end) of a parameter's master weights, or of its state called `key`, flat."""
        found = []
        for number in self.partition.holders(name, begin, end):
            part = self.partition.part(name, number)
            if part is None:
                continue
            flats, inner = self.of_rank(number)
            values = flats[part.flat] if key is None else inner["state"][part.flat][key]
            first, last = max(begin, part.begin), min(end, part.begin + part.size)
            start = part.start + first - part.begin
            found.append(values.detach().reshape(-1)[start : start + last - first])
        return torch.cat(found)

    def state_like(self, name: str) -> dict[str, Any]:
        """Return the state that belongs to a parameter's flat tensor on a rank that holds some of it."""
        place = self.partition.places[name]
        holder = self.partition.holders(name, 0, 1)[0]
        state: dict[str, Any] = self.of_rank(holder)[1]["state"].get(place.flat, {})
        return state

    def groups(self) -> list[dict[str, Any]]:
        """Return the settings of the optimizer's groups of parameters, such as learning rates."""
        groups: list[dict[str, Any]] = self.of_rank(0)[1]["param_groups"]
        return groups

    def untrained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters that are not trained, and the buffers, in full."""
        module = self.facts["module"]
        if self.partition.stage < 3:
            yield from ((name, value) for name, value in module.items() if name not in self.partition.places)
            return
        yield from ((name, module[name]) for name in self.facts["buffer_names"])
        shapes = self.facts["frozen_param_shapes"] or {}
        ranks = range(self.partition.ranks if shapes else 0)
        files = [safe_load(self.folder / MODEL_PART_FILE.format(rank=number)) for number in ranks]
        for name, shape in shapes.items():
            parts = [file["frozen_param_fragments"][name].reshape(-1) for file in files]
            yield name, torch.cat(parts)[: shape.numel()].view(shape)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights in full, the trained ones as the optimizer has them, by their names in the engine."""
        if self.partition.stage < 3:
            shapes = {name: value.shape for name, value in self.facts["module"].items()}
        else:
            shapes = {name: shape for group in self.facts["param_shapes"] for name, shape in group.items()}
        trained = {
            name: self.read(name, 0, place.size, None).view(shapes[name])
            for name, place in self.partition.places.items()
        }
        return dict(self.untrained()) | trained
