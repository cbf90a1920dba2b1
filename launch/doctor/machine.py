"""The operating system, the processor and the memory of this machine."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from hydrazero.launch.doctor.findings import Finding, Probe

INSTRUCTION_SETS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "asimd",
    "sve",
    "sve2",
    "bf16",
)
"""Flags of /proc/cpuinfo that matter for the speed of the CPU kernels."""
LITTLE_SHM = 256e6
"""Free bytes in /dev/shm below which data workers may fail: they pass batches to the ranks through it."""


def machine_probes() -> list[Probe]:
    """Return probes for the operating system, the processor and the memory."""
    return [
        Probe(name="operating system", find=_system),
        Probe(name="processor", find=_processor),
        Probe(name="instruction sets", find=_instruction_sets),
        Probe(name="cores", find=lambda: f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} may be used"),
        Probe(name="memory", find=_memory),
        Probe(name="/dev/shm", find=_shared_memory),
        Probe(name="OMP_NUM_THREADS", find=lambda: os.environ.get("OMP_NUM_THREADS", "not set")),
    ]


def _system() -> str:
    name = platform.freedesktop_os_release().get("PRETTY_NAME", "") if Path("/etc/os-release").exists() else ""
    return f"{name}, {platform.platform()}" if name else platform.platform()


def _cpu_facts() -> dict[str, str]:
    """Return the lines of /proc/cpuinfo on the first core."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _processor() -> str:
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def _instruction_sets() -> str:
    facts = _cpu_facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return " ".join(name for name in INSTRUCTION_SETS if name in flags) or "none of those that the kernels use"


def _memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page / 1e9 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return f"{total:.1f} GB, of which {free:.1f} GB are free"


def _shared_memory() -> Finding:
    usage = shutil.disk_usage("/dev/shm")
    value = f"{usage.total / 1e9:.2f} GB, of which {usage.free / 1e9:.2f} GB are free"
    advice = "data workers need room in /dev/shm: give the container more (docker run --shm-size 2g)"
    return Finding(name="/dev/shm", value=value, missing=advice if usage.free < LITTLE_SHM else "")
