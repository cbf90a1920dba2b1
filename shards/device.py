"""The devices of this machine: NVIDIA's and AMD's GPUs ('cuda' in torch), Intel's ('xpu'), or the CPU.

All code that asks which device to use asks here.
"""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("cuda", "xpu")
BACKENDS = {"cuda": "nccl", "xpu": "xccl", "cpu": "gloo"}
"""Kind of device -> torch's backend for collectives; 'nccl' is RCCL on AMD, 'xccl' is oneCCL."""
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
"""Kind of GPU -> environment variable that selects the GPUs which a process sees."""


def device_kind() -> str:
    """Return the kind of this machine's GPUs: 'cuda' or 'xpu'; 'cpu' if it has none."""
    return next((kind for kind in KINDS if getattr(torch, kind).is_available()), "cpu")


def has_gpu() -> bool:
    """Return whether this machine has a GPU of any kind."""
    return device_kind() != "cpu"


def gpu_module() -> Any:
    """Return `torch.cuda` or `torch.xpu`, which have the same functions; None if there is no GPU."""
    return getattr(torch, device_kind()) if has_gpu() else None


def device_of(local_rank: int) -> torch.device:
    """Return the device for the process with this number among those of its machine."""
    return torch.device(device_kind(), local_rank) if has_gpu() else torch.device("cpu")
