"""The weights that an engine's optimizer steps: the model's own, or the parts of them that ZeRO deals to this rank.

Where the model's weights are in lower precision they are roundings of these. DeepSpeed's own functions for this give
float32 alone, whatever the precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hydrazero.trainer.ranks.distributed import rank, ranks


def stepped_weights(engine: Any) -> list[Tensor]:
    """Return what this rank's optimizer steps, in an order that stays."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # what DeepSpeed takes for bf16 under ZeRO 1
        return list(optimizer.fp32_groups_flat_partition)
    return list(optimizer.single_partition_of_fp32_groups)


@torch.no_grad()
def spread_weights(engine: Any) -> None:
    """Let the model have what `stepped_weights` are now; called on every rank."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:  # as at the end of its step
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


@torch.no_grad()
def whole_weight(engine: Any, parameter: Any) -> Tensor:
    """Return a parameter in full, in the precision in which it is stepped; called on every rank."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return parameter.detach().clone()
    if stage == 3:
        part = engine.optimizer.get_local_fp32_param(parameter).reshape(-1)
        joined = part.new_empty(ranks() * part.numel())
        dist.all_gather_into_tensor(joined, part.contiguous())
        shape = parameter.ds_shape
        return joined[: shape.numel()].view(shape)
    whole = torch.zeros(parameter.numel(), dtype=stepped_weights(engine)[0].dtype, device=parameter.device)
    mapping = parameter._hp_mapping  # of the piece that this rank steps, if any
    if mapping is not None:
        place = mapping.lp_fragment_address
        whole[place.start : place.start + place.numel] = mapping.get_hp_fragment().detach()
    dist.all_reduce(whole)
    return whole.view(parameter.shape)


@torch.no_grad()
def set_whole_weight(engine: Any, parameter: Any, value: Tensor) -> None:
    """Set this rank's part of a parameter among `stepped_weights`; the model has it after `spread_weights`."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        parameter.copy_(value)
    elif stage == 3:
        count = parameter.ds_tensor.numel()
        flat = value.new_zeros(ranks() * count)
        flat[: value.numel()] = value.reshape(-1)
        engine.optimizer.set_local_hp_param(flat[rank() * count : (rank() + 1) * count], parameter)
    else:
        parameter.set_full_hp_param(value)
