"""From a checkpoint into an engine that cuts weights and moments in another way.

Pieces are copied by parameter, as they are, so that other ranks, another ZeRO stage or another precision of the model's
weights lose nothing of the optimizer's weights and moments. DeepSpeed's universal checkpoints do so by way of files,
but neither from nor to stage 0.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.layout import Layout, is_bf16, layout_of
from hydrazero.trainer.ranks.distributed import rank

FP32_FLATS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
BASE_STATES = ("base_optimizer_state", "optimizer_state_dict")
"""Names in DeepSpeed's files: of the optimizer's weights and state, under ZeRO 1 and 2, and under ZeRO 3."""


class SavedTensors:
    """The optimizer's weights and state in a checkpoint's files, of which only what is asked for is read."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        first = "zero_pp_rank_0_mp_rank_00_model_states.pt" if layout.stage == 3 else "mp_rank_00_model_states.pt"
        self.facts = _load(folder / first)
        """What DeepSpeed keeps beside weights: counts of steps, schedule."""
        self._opened: dict[int, tuple[list[Tensor], dict[str, Any]]] = {}

    def of_rank(self, number: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Return a rank's flat tensors of weights, and the state of its optimizer."""
        if number not in self._opened:
            self._opened[number] = self._open(number)
        return self._opened[number]

    def _open(self, number: int) -> tuple[list[Tensor], dict[str, Any]]:
        if self.layout.stage == 0:
            return [self.facts["module"][name] for name in self.layout.places], self.facts["optimizer"]
        (path,) = self.folder.glob(f"*zero_pp_rank_{number}_mp_rank_00_optim_states.pt")
        document = _load(path)["optimizer_state_dict"]
        flats, base = (next(document[key] for key in keys if key in document) for keys in (FP32_FLATS, BASE_STATES))
        return flats, base

    def read(self, name: str, begin: int, end: int, key: str | None) -> Tensor:
        """Return [begin, end) of a parameter's weights, or of its state called `key`, in one dimension."""
        found = []
        for number in self.layout.holders(name, begin, end):
            piece = self.layout.piece(name, number)
            if piece is None:
                continue
            flats, base = self.of_rank(number)
            values = flats[piece.flat] if key is None else base["state"][piece.flat][key]
            first, last = max(begin, piece.begin), min(end, piece.begin + piece.size)
            start = piece.start + first - piece.begin
            found.append(values.detach().reshape(-1)[start : start + last - first])
        return torch.cat(found)

    def state_like(self, name: str) -> dict[str, Any]:
        """Return the state that belongs to a parameter's flat tensor on a rank that holds some of it."""
        place = self.layout.places[name]
        holder = self.layout.holders(name, 0, 1)[0]
        state: dict[str, Any] = self.of_rank(holder)[1]["state"].get(place.flat, {})
        return state

    def groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups of parameters with their rates and the like."""
        groups: list[dict[str, Any]] = self.of_rank(0)[1]["param_groups"]
        return groups

    def untrained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters that the optimizer does not have, and buffers, whole."""
        module = self.facts["module"]
        if self.layout.stage < 3:
            yield from ((name, value) for name, value in module.items() if name not in self.layout.places)
            return
        yield from ((name, module[name]) for name in self.facts["buffer_names"])
        shapes = self.facts["frozen_param_shapes"] or {}
        pattern = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
        files = [_load(self.folder / pattern.format(number)) for number in range(self.layout.ranks if shapes else 0)]
        for name, shape in shapes.items():
            parts = [file["frozen_param_fragments"][name].reshape(-1) for file in files]
            yield name, torch.cat(parts)[: shape.numel()].view(shape)


def _load(path: Path) -> Any:
    # Memory-mapped, so that a rank which needs a little of each file does not read all of them.
    return torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))


@torch.no_grad()
def load_from_layout(engine: Any, folder: Path, saved: Layout) -> None:
    """Load a checkpoint of another layout into an engine; called on every rank.

    Raises ConfigError if other parameters are trained than in the checkpoint, or if the optimizer keeps a state that
    cannot be cut by parameter.
    """
    now, tensors = layout_of(engine), SavedTensors(folder, saved)
    if set(now.places) != set(saved.places):
        raise ConfigError(
            f"checkpoint {folder} was trained with other parameters than the run file trains now; resume with the "
            "same train.freeze and model."
        )
    optimizer = engine.optimizer
    if now.stage == 3:
        optimizer.checkpoint_event_prologue()
    _load_untrained(engine, tensors)
    flats = _flats_of_optimizer(engine, now)
    states = {}
    for number, flat in enumerate(flats):
        names = [name for name, place in now.places.items() if place.flat == number]
        states[number] = _fill(flat, names, now, tensors)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in tensors.groups()]
    _hand_over(engine, now, states, groups)
    if engine.lr_scheduler is not None and tensors.facts["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(tensors.facts["lr_scheduler"])
    for count in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, count, tensors.facts[count])


def _flats_of_optimizer(engine: Any, layout: Layout) -> list[Tensor]:
    """Tensors that this rank's optimizer changes, in the order of its state."""
    optimizer = engine.optimizer
    if layout.stage == 0:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if layout.stage == 3:
        name = "fp32_partitioned_groups_flat"
    else:
        name = "fp32_groups_flat_partition" if is_bf16(optimizer) else "single_partition_of_fp32_groups"
    flats: list[Tensor] = getattr(optimizer, name)
    return flats


def _fill(flat: Tensor, names: list[str], now: Layout, tensors: SavedTensors) -> dict[str, Any]:
    """Set this rank's part of a flat tensor, and return the state that goes with it."""
    like = tensors.state_like(names[0])
    cut = [key for key, value in like.items() if torch.is_tensor(value) and value.dim() > 0]
    # Counts of steps are copied: one flat tensor may become many, each of which counts on by itself.
    state: dict[str, Any] = {
        key: torch.zeros_like(flat) if key in cut else copy.deepcopy(value) for key, value in like.items()
    }
    for name in names:
        piece = now.piece(name, rank())
        if piece is None:
            continue
        for key in (None, *cut):
            values = tensors.read(name, piece.begin, piece.begin + piece.size, key)
            if len(values) != piece.size:
                raise ConfigError(
                    f"the optimizer's state '{key}' is not one number for each weight, so it cannot go to other ranks "
                    "or another ZeRO stage; resume with those of the checkpoint."
                )
            into = flat if key is None else state[key]
            into.detach().view(-1)[piece.start : piece.start + piece.size].copy_(values)
    return state


def _hand_over(engine: Any, now: Layout, states: dict[int, Any], groups: list[dict[str, Any]]) -> None:
    """Let the optimizer have its state, and the model the optimizer's weights."""
    optimizer = engine.optimizer
    document = optimizer.state_dict()
    base = document if now.stage == 0 else next(document[key] for key in BASE_STATES if key in document)
    base["state"] = {number: state for number, state in states.items() if state}
    base["param_groups"] = [
        {**group, "params": own["params"]} for group, own in zip(groups, base["param_groups"], strict=True)
    ]
    if now.stage == 0:
        optimizer.load_state_dict(base)
    elif now.stage == 3:
        optimizer.load_state_dict({rank(): document})
    else:
        optimizer.optimizer.load_state_dict(base)
        optimizer.update_lp_params()


def _load_untrained(engine: Any, tensors: SavedTensors) -> None:
    import deepspeed

    there = dict(engine.module.named_parameters()) | dict(engine.module.named_buffers())
    for name, value in tensors.untrained():
        sharded = hasattr(there[name], "ds_id")
        with deepspeed.zero.GatheredParameters([there[name]] if sharded else [], modifier_rank=0, enabled=sharded):
            if not sharded or rank() == 0:
                there[name].copy_(value)
