"""Time and arithmetic of the sums over neighbours for features up to degree 1, 2 and 3, and the processor's peak."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from ours import batch_of
from systems import CUTOFF, FEATURES, RADIAL_FUNCTIONS, THREADS
from timing import hand_over
from torch import Tensor

from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.encoders.harmonics import solid_harmonics
from hydrazero.models.encoders.schnet import SchNet
from hydrazero.models.ops.kernels import load_kernels
from hydrazero.models.ops.slots import slots_of

DEGREES = (1, 2, 3)
MATRIX = 2048


def operators(degree: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Return each operator for copper cells, and how many products and sums it needs."""
    torch.manual_seed(0)
    batch = batch_of("cu", 1)
    slots = slots_of(batch, kernels=True)
    settings = EncoderSettings(radial_functions=RADIAL_FUNCTIONS, cutoff=CUTOFF)
    pairs = SchNet(settings).measure(slots, slots.pair_vectors(batch.positions, batch.shifts))
    harmonics = solid_harmonics(pairs.directions, degree)[..., 1:] * slots.mask.unsqueeze(-1)
    f, atoms, components, functions = FEATURES, slots.atoms, (degree + 1) ** 2, pairs.radial.shape[2]
    x, d, g = torch.randn(atoms, components, f), torch.randn(atoms, degree, f), torch.randn(atoms, components, f)
    w, v = torch.randn(functions, (degree + 1) * f), torch.randn(functions, degree * f)
    shared: tuple[Tensor, ...] = (slots.row_atom, slots.neighbours, slots.mask, pairs.radial, harmonics)
    ops = torch.ops.hydrazero
    calls = {
        "pair_sum": lambda: ops.pair_sum(*shared, w, v, x, d),
        "pair_sum_transposed": lambda: ops.pair_sum_transposed(*shared, w, v, g, components),
        "pair_gradient": lambda: ops.pair_gradient(*shared, w, v, x, d, g),
        "pair_weight_gradient": lambda: ops.pair_weight_gradient(*shared, x, d, g),
    }
    # For each feature of a slot: a product and a sum for each radial function of each path, and for each component.
    filters, components_of = 2 * functions * (2 * degree + 1), 2 * (2 * components - 1)
    turned = 2 * functions * degree + 2 * (components - 1)  # filters again, for the derivative of the harmonics
    per_feature = {name: filters + components_of + (turned if name == "pair_gradient" else 0) for name in calls}
    count = float(slots.mask.sum()) * f
    return {name: (call, per_feature[name] * count) for name, call in calls.items()}


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds of one call, of those that fit into a tenth of a second."""
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        call()
        calls += 1
    return (time.perf_counter() - started) / calls


def main() -> None:
    """Measure in turn, so that a change of the processor's speed meets all alike.

    The peak is that of a product of two large matrices, in GFLOP/s, and the work of operators is in GFLOP.
    """
    torch.set_num_threads(THREADS)
    load_kernels()
    left, right = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    all_operators = {degree: operators(degree) for degree in DEGREES}
    found: dict[str, list[float]] = {"peak": []}
    for _ in range(int(sys.argv[1])):
        found["peak"].append(2.0 * MATRIX**3 / seconds(lambda: left @ right) / 1e9)
        for degree, calls in all_operators.items():
            for name, (call, flop) in calls.items():
                found.setdefault(f"{name}_L{degree}", []).append(seconds(call))
                found[f"{name}_L{degree}_work"] = [flop / 1e9]
    hand_over(found)


if __name__ == "__main__":
    main()
