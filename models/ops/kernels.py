"""C++ kernels for the CPU, compiled once per machine with the installed compiler and kept in a cache."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import torch
from torch import Tensor

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import locked, replacing

SOURCE = Path(__file__).with_name("pair_sums.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
PROCESSOR_FACTS = ("flags", "Features", "CPU implementer", "CPU part")
"""Beginnings of the lines of /proc/cpuinfo (x86 and ARM) that list the available instructions."""
FEATURE_TILE = 16
"""The kernels need a number of features that is a multiple of this."""


_LOADING = threading.Lock()
"""Held while the library is loaded: an operator can be registered once only, and threads may load it together."""


class KernelsUnavailable(RuntimeError):
    """The kernels cannot be compiled or loaded on this machine; the message says why."""


def load_kernels() -> None:
    """Register `torch.ops.hydrazero`, compiled first if this machine has no library yet; raise KernelsUnavailable."""
    with _LOADING:
        _load_once()


@functools.cache
def _load_once() -> None:
    library = cached_library()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise KernelsUnavailable(f"{library} cannot be loaded ({error})") from error
    _describe_to_the_compiler()


def cached_library() -> Path:
    """Return the path of the compiled library; wait if another process compiles it at the same time."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise KernelsUnavailable("no C++ compiler was found (c++, g++, clang++, or $CXX)")
    compiler = shlex.split(found)  # $CXX may hold options, or 'ccache g++'
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):
        raise KernelsUnavailable("there is no home folder for the cache; set XDG_CACHE_HOME")
    folder = Path(cache) / "hydrazero"
    library = folder / f"kernels-{_key(compiler)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not library.exists():
                _compile(compiler, library)
    except OSError as error:
        raise KernelsUnavailable(f"{library} cannot be written ({error.strerror or error})") from error
    except ConfigError as error:
        raise KernelsUnavailable(str(error).rstrip(".")) from error
    return library


def _key(compiler: list[str]) -> str:
    """Return a hash of everything that the library depends on; machines with other processors may share the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = {line for line in lines if line.startswith(PROCESSOR_FACTS)} or {platform.processor()}
    parts = (SOURCE.read_text(), torch.__version__, *compiler, *FLAGS, platform.machine(), *sorted(facts))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    folders = [flag for path in library_paths() for flag in ("-L", path)]
    with replacing(library, shared=True) as part:
        output = ["-o", str(part), *folders, "-lc10", "-ltorch_cpu", "-ltorch"]
        command = [*compiler, *FLAGS, *includes, str(SOURCE), *output]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise KernelsUnavailable(f"{shlex.join(compiler)} cannot be run ({error.strerror or error})") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise KernelsUnavailable(f"{shlex.join(compiler)} could not compile them: {' '.join(lines[:1])}")


def _describe_to_the_compiler() -> None:
    """Declare the shapes of the operators' results, with which graphs that contain them are traced and compiled."""
    fake = torch.library.register_fake

    @fake("hydrazero::segment_sum")
    def _(row_atom: Tensor, values: Tensor, opposite: Tensor | None, atoms: int) -> Tensor:
        return values.new_empty(atoms, values.shape[1])

    @fake("hydrazero::task_linear")
    def _(x: Tensor, weight: Tensor, task: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[1])

    @fake("hydrazero::task_outer")
    def _(g: Tensor, x: Tensor, task: Tensor, tasks: int) -> Tensor:
        return x.new_empty(tasks, g.shape[1], x.shape[1])

    @fake("hydrazero::pair_sum")
    def _(
        row_atom: Tensor,
        neighbours: Tensor,
        mask: Tensor,
        radial: Tensor,
        directions: Tensor,
        weight: Tensor,
        s: Tensor | None,
        y: Tensor | None,
        d: Tensor | None,
        atoms: int,
    ) -> tuple[Tensor, Tensor]:
        features = weight.shape[1] // 3
        return weight.new_empty(atoms, features), weight.new_empty(atoms, 3, features)

    @fake("hydrazero::pair_sum_transposed")
    def _(
        row_atom: Tensor,
        neighbours: Tensor,
        mask: Tensor,
        radial: Tensor,
        directions: Tensor,
        weight: Tensor,
        gs: Tensor | None,
        gv: Tensor,
        with_vectors: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        atoms, _, features = gv.shape
        scalars = weight.new_empty(0 if gs is None else atoms, features)
        return scalars, weight.new_empty(atoms if with_vectors else 0, 3, features), weight.new_empty(atoms, features)

    @fake("hydrazero::pair_gradient")
    def _(
        row_atom: Tensor, neighbours: Tensor, mask: Tensor, radial: Tensor, directions: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return radial.new_empty(radial.shape), directions.new_empty(directions.shape)

    @fake("hydrazero::pair_weight_gradient")
    def _(
        row_atom: Tensor,
        neighbours: Tensor,
        mask: Tensor,
        radial: Tensor,
        directions: Tensor,
        s: Tensor | None,
        y: Tensor | None,
        d: Tensor,
        gs: Tensor | None,
        gv: Tensor,
    ) -> Tensor:
        return gv.new_empty(radial.shape[2], 3 * gv.shape[2])
