"""GPUs as PyTorch sees them, and the compiled kernels for the CPU."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from hydrazero.launch.doctor.findings import Finding, Probe, ProbeError, first_line, run_python

PROBED = "from hydrazero.launch.doctor import probed; probed"
"""Start of the code that a probe runs in another process; a function of that module follows."""
KERNELS = (
    "without the CPU kernels, training and inference on the CPU are several times slower: install a C++ compiler "
    "(on Debian or Ubuntu: apt install g++) or set CXX to one"
)


def device_probes() -> list[Probe]:
    """Return probes for the device, its driver, the compiler and the CPU kernels."""
    return [
        Probe(name="device", find=_device, missing="PyTorch cannot be used: reinstall it"),
        Probe(name="GPU driver", find=_driver),
        Probe(name="C++ compiler", find=_compiler),
        Probe(name="CPU kernels", find=_kernels, missing=KERNELS),
    ]


def _device() -> Finding:
    """Return the GPUs that ranks would use, or the CPU, and what PyTorch is built for."""
    built_for, kind, *gpus = run_python(f"{PROBED}.print_device()").splitlines()
    if not gpus:
        unused = "a GPU is there, but this PyTorch cannot use it: install a PyTorch for it (see pytorch.org)"
        value = f"CPU; PyTorch is built for {built_for} and sees no GPU"
        return Finding(name="device", value=value, missing=unused if _gpu_files() else "")
    counts = {gpu: gpus.count(gpu) for gpu in dict.fromkeys(gpus)}
    shown = "; ".join(f"{count} x {gpu}" for gpu, count in counts.items())
    return Finding(name="device", value=f"{kind}: {shown}; PyTorch is built for {built_for}")


def _gpu_files() -> bool:
    """Return whether the operating system has a GPU of NVIDIA or AMD for computing."""
    return Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()


def _driver() -> str:
    for module in ("nvidia", "amdgpu", "xe", "i915"):
        path = Path(f"/sys/module/{module}/version")
        if path.exists():
            return f"{module} {path.read_text(encoding='utf-8').strip()}"
    if shutil.which("nvidia-smi"):
        return f"nvidia {first_line(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'])}"
    raise ProbeError("none")


def _compiler() -> str:
    named = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if named is None:
        raise ProbeError("not found")
    return f"{named}: {first_line([*shlex.split(named), '--version'])}"


def _kernels() -> str:
    """Compile and load the kernels, as the first training run would."""
    run_python(f"{PROBED}.try_kernels()")
    return "compiled and loaded"
