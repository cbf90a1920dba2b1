"""What probes of `hydrazero doctor` do in a process of their own, since a broken PyTorch may end it."""

from __future__ import annotations

import torch

from hydrazero.models.ops.kernels import KernelsUnavailable, load_kernels
from hydrazero.shards.device import device_kind, gpu_module


def print_device() -> None:
    """Print what PyTorch is built for, the kind of device that ranks use, and a line for each GPU."""
    versions = {name: getattr(torch.version, name, None) for name in ("cuda", "hip", "xpu")}
    print(", ".join(f"{name.upper()} {found}" for name, found in versions.items() if found) or "CPUs only")
    print(device_kind())
    gpu = gpu_module()
    for number in range(0 if gpu is None else gpu.device_count()):
        facts = gpu.get_device_properties(number)
        print(f"{facts.name}, {facts.total_memory / 1e9:.0f} GB")


def try_kernels() -> None:
    """Compile and load the CPU kernels; exit with a sentence on stderr if that is not possible."""
    try:
        load_kernels()
    except KernelsUnavailable as error:
        raise SystemExit(str(error)) from error
