"""Products that keep their precision where an encoder's others are in a lower one: of geometry, and in heads.

An encoder may run under autocast, or on a GPU whose float32 products may round to TF32 (10 bits, as float16).
What is made of positions, and what an energy is read from, is not to be rounded: autocast is left aside here, weights
of lower precision are widened, and where TF32 is on, float32 is multiplied in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def rounds_to_tf32(x: Tensor) -> bool:
    """Whether a product of such tensors would be rounded to TF32."""
    return x.is_cuda and x.dtype == torch.float32 and bool(torch.backends.cuda.matmul.allow_tf32)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Precision to multiply in: at least float32."""
    if rounds_to_tf32(x):
        return torch.float64
    return torch.promote_types(x.dtype, torch.float32)


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., I] times weight [O, I] plus bias [O], in the precision of x: [..., O]."""
    dtype = _product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        out = functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return out.to(torch.promote_types(x.dtype, torch.float32))


def exact_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Return the product of x and y (see `torch.matmul`) in the higher precision of both."""
    wide = x.to(torch.promote_types(x.dtype, y.dtype))
    dtype = _product_dtype(wide)
    with torch.autocast(x.device.type, enabled=False):
        out = torch.matmul(wide.to(dtype), y.to(dtype))
    return out.to(torch.promote_types(wide.dtype, torch.float32))


class ExactLinear(nn.Linear):
    """Linear layer on what is measured, such as radial functions."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O], in the precision of the input."""
        return exact_linear(input, self.weight, self.bias)
