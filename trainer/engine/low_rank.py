"""Low-rank changes of an encoder's linear maps (LoRA: Hu et al. 2021, arXiv 2106.09685, sec. 4.1): W + B A.

Each map is reparametrised, so that encoders, compiled steps and ZeRO use it like any other weight. Checkpoints hold
W, A and B separately; `merged` adds them up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hydrazero.models.ops.exact import exact_matmul

INSIDE, ORIGINAL, DOWN, UP = ".parametrizations.", ".original", ".0.down", ".0.up"
"""Parts of the names that PyTorch gives to W, A and B of a reparametrised weight."""


class LowRankChange(nn.Module):
    """W + B A for a matrix, or for each matrix of a stack [..., O, I]; B is zero at first, so the sum is W."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        *stack, outputs, inputs = weight.shape
        rank = min(rank, outputs, inputs)
        # The paper's factor alpha / rank is 1: with Adam, it has the same effect as the learning rate.
        self.down = nn.Parameter(torch.randn(*stack, rank, inputs).to(weight) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(*stack, outputs, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum of a weight [..., O, I] and its change, in the weight's precision."""
        return (weight + exact_matmul(self.up, self.down)).to(weight.dtype)


def add_low_rank_changes(encoder: nn.Module, rank: int) -> None:
    """Freeze an encoder's weights, and give its linear maps low-rank changes, which are trained instead.

    Maps that were frozen before get none.
    """
    maps = [
        (module, name, parameter)
        for module in encoder.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.dim() >= 2
    ]
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    for module, name, parameter in maps:
        parametrize.register_parametrization(module, name, LowRankChange(parameter, rank))


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with low-rank changes added, by the names of a model without such changes."""
    plain = {}
    for name, value in weights.items():
        if INSIDE not in name:
            plain[name] = value
        elif name.endswith(ORIGINAL):
            stem = name.removesuffix(ORIGINAL)
            up, down = weights[stem + UP], weights[stem + DOWN]
            plain[stem.replace(INSIDE, ".")] = value.to(up.dtype) + exact_matmul(up, down)
    return plain
