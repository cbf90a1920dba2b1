"""Matrix products that keep full precision where other products of the encoder are in a lower one.

An encoder may run under autocast, or on a GPU whose float32 products are rounded to TF32 (10 bits, like float16).
Quantities made from positions, and those from which an energy is read, must not be rounded. So these products ignore
autocast, convert weights of lower precision, and multiply float32 in float64 where TF32 is on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def rounds_to_tf32(x: Tensor) -> bool:
    """Return whether a product of such tensors would be rounded to TF32."""
    return x.is_cuda and x.dtype == torch.float32 and bool(torch.backends.cuda.matmul.allow_tf32)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of a product, which is at least float32."""
    if rounds_to_tf32(x):
        return torch.float64
    return torch.promote_types(x.dtype, torch.float32)


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., I] times weight [O, I] plus bias [O], [..., O], in the precision of x."""
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
    """Linear layer for geometric quantities such as radial functions, which must not be rounded."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., O] for inputs [..., I], in the precision of the input."""
        return exact_linear(input, self.weight, self.bias)


class ExactLayerNorm(nn.LayerNorm):
    """Normalisation of features in the precision of the input, whatever that of the weights is."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the shape and precision of the input."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
