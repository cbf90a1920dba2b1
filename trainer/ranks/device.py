"""GPUs as torch knows them: NVIDIA's and AMD's ('cuda'), Intel's ('xpu')."""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("cuda", "xpu")
BACKENDS = {"cuda": "nccl", "xpu": "xccl", "cpu": "gloo"}
"""What ranks talk through; NCCL is RCCL on AMD, xccl is oneCCL."""


def device_kind() -> str:
    """Kind of this host's GPUs; 'cpu' if it has none."""
    return next((kind for kind in KINDS if getattr(torch, kind).is_available()), "cpu")


def gpu_module() -> Any:
    """Return `torch.cuda` or `torch.xpu`, which have the same functions; None if there is no GPU."""
    kind = device_kind()
    return None if kind == "cpu" else getattr(torch, kind)
