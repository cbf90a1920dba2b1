"""C++ kernels for the CPU, compiled once per machine with the installed compiler and kept in a cache."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import locked, replacing

FOLDER = Path(__file__).with_name("cpp")
SOURCES = (
    "pair_sums.cpp",
    "pair_gradients.cpp",
    "segments.cpp",
    "degree_products.cpp",
    "matrix_steps.cpp",
    "sphere_products.cpp",
)
HEADERS = ("lanes.h", "form.h")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-Wno-psabi")
LINK_FLAGS = ("-shared", "-fopenmp", "-lc10", "-ltorch_cpu", "-ltorch")
PROCESSOR_FACTS = ("flags", "Features", "CPU implementer", "CPU part")
"""Beginnings of the lines of /proc/cpuinfo (x86 and ARM) that list the available instructions."""
FEATURE_TILE = 16
"""The kernels need a number of features that is a multiple of this."""
KERNEL_DEGREE = 4
"""The highest degree of features that the kernels have loops for."""


_LOADING = threading.Lock()
"""Held while the library is loaded: an operator can be registered once only, and threads may load it together."""


class KernelsUnavailable(RuntimeError):
    """The kernels cannot be compiled or loaded on this machine; the message says why."""


def degrees_of(components: int) -> tuple[int, int]:
    """Return the first and the last degree of features with (L + 1)^2 components, or of those without degree 0."""
    root = math.isqrt(components + 1)
    return (1, root - 1) if root * root == components + 1 else (0, math.isqrt(components) - 1)


def left_to_plain_pytorch(features: int, degree: int) -> str | None:
    """Return why the kernels do not take sums over neighbours of features up to a degree; None if they do."""
    if features % FEATURE_TILE:
        return f"model.features = {features} is not a multiple of {FEATURE_TILE}, as the CPU kernels need"
    if degree > KERNEL_DEGREE:
        return f"model.max_degree = {degree} is above {KERNEL_DEGREE}, the highest degree that the CPU kernels sum"
    return None


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
    sources = [(FOLDER / name).read_text() for name in (*SOURCES, *HEADERS)]
    parts = (*sources, torch.__version__, *compiler, *FLAGS, *LINK_FLAGS, platform.machine(), *sorted(facts))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], library: Path) -> None:
    """Compile the sources, two at a time, and link them."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    folders = [flag for path in library_paths() for flag in ("-L", path)]
    with (
        replacing(library, shared=True) as part,
        tempfile.TemporaryDirectory(prefix=".kernels-", dir=library.parent) as objects,
    ):
        outputs = [str(Path(objects) / f"{name}.o") for name in SOURCES]
        commands = [
            [*compiler, *FLAGS, *includes, "-c", str(FOLDER / name), "-o", output]
            for name, output in zip(SOURCES, outputs, strict=True)
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda command: _run_compiler(compiler, command, "compile"), commands))
        _run_compiler(compiler, [*compiler, *outputs, *folders, *LINK_FLAGS, "-o", str(part)], "link")


def _run_compiler(compiler: list[str], command: list[str], task: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelsUnavailable(f"{shlex.join(compiler)} cannot be run ({error.strerror or error})") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith("collect2")]
        said = [line for line in lines if "error" in line] or lines or [f"exit status {done.returncode}"]
        raise KernelsUnavailable(f"{shlex.join(compiler)} could not {task} the kernels: {said[0]}")


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

    @fake("hydrazero::degree_linear")
    def _(x: Tensor, weight: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1], weight.shape[2])

    @fake("hydrazero::degree_outer")
    def _(x: Tensor, g: Tensor, degrees: int) -> Tensor:
        return x.new_empty(degrees, x.shape[2], g.shape[2])

    @fake("hydrazero::matrix_step")
    def _(a: Tensor, b: Tensor, kind: int) -> Tensor:
        return a.new_empty(a.shape)

    @fake("hydrazero::sphere_product")
    def _(factors: list[Tensor], harmonics: Tensor, weights: Tensor, components: int) -> Tensor:
        return factors[0].new_empty(factors[0].shape[0], components, factors[0].shape[2])

    @fake("hydrazero::sphere_gradients")
    def _(factors: list[Tensor], harmonics: Tensor, weights: Tensor, h: Tensor) -> list[Tensor]:
        return [factor.new_empty(factor.shape) for factor in factors]

    @fake("hydrazero::sphere_curvatures")
    def _(factors: list[Tensor], harmonics: Tensor, weights: Tensor, h: Tensor, along: list[Tensor]) -> list[Tensor]:
        return [factor.new_empty(factor.shape) for factor in (h, *factors)]

    @fake("hydrazero::matrix_step_gradients")
    def _(a: Tensor, b: Tensor, g: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        return a.new_empty(a.shape), a.new_empty(a.shape)

    @fake("hydrazero::matrix_step_curvature")
    def _(a: Tensor, b: Tensor, g: Tensor, for_a: Tensor, for_b: Tensor, kind: int) -> tuple[Tensor, Tensor, Tensor]:
        return a.new_empty(a.shape), a.new_empty(a.shape), a.new_empty(a.shape)

    fake("hydrazero::pair_sum", _sum_shape)
    fake("hydrazero::pair_sum_transposed", _transposed_shapes)
    fake("hydrazero::pair_gradient", _gradient_shapes)
    fake("hydrazero::pair_weight_gradient", _weight_gradient_shapes)


def _sum_shape(
    row_atom: Tensor,
    neighbours: Tensor,
    mask: Tensor,
    radial: Tensor,
    harmonics: Tensor,
    tensor_weight: Tensor | None,
    scalar_weight: Tensor | None,
    tensors: Tensor | None,
    scalars: Tensor | None,
) -> Tensor:
    some = tensors if tensors is not None else scalars
    assert some is not None
    return some.new_empty(some.shape[0], harmonics.shape[2] + 1, some.shape[2])


def _transposed_shapes(
    row_atom: Tensor,
    neighbours: Tensor,
    mask: Tensor,
    radial: Tensor,
    harmonics: Tensor,
    tensor_weight: Tensor | None,
    scalar_weight: Tensor | None,
    g: Tensor,
    components: int,
) -> tuple[Tensor, Tensor]:
    atoms, own, features = g.shape
    degrees = 0 if scalar_weight is None else math.isqrt(own) - 1
    return g.new_empty(atoms, components, features), g.new_empty(atoms, degrees, features)


def _gradient_shapes(
    row_atom: Tensor, neighbours: Tensor, mask: Tensor, radial: Tensor, harmonics: Tensor, *rest: Tensor | None
) -> tuple[Tensor, Tensor]:
    return radial.new_empty(radial.shape), harmonics.new_empty(harmonics.shape)


def _weight_gradient_shapes(
    row_atom: Tensor,
    neighbours: Tensor,
    mask: Tensor,
    radial: Tensor,
    harmonics: Tensor,
    tensors: Tensor | None,
    scalars: Tensor | None,
    g: Tensor,
) -> tuple[Tensor, Tensor]:
    functions, features = radial.shape[2], g.shape[2]
    for_tensors = 0 if tensors is None else len(range(*degrees_of(tensors.shape[1]))) + 1
    for_scalars = 0 if scalars is None else math.isqrt(g.shape[1]) - 1
    return g.new_empty(functions, for_tensors * features), g.new_empty(functions, for_scalars * features)
