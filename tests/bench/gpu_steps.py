"""Time per step of our PaiNN on a GPU, eager and compiled, in float32, tf32 and bfloat16, and arithmetic per step.

    python tests/bench/gpu_steps.py REPEATS [DEVICE]

The output holds seconds. `flops_*` are the multiplications and additions of matrix products in an eager step, and
`peak_*` those of one second of large matrix products in the same precision on the same device.
"""

from __future__ import annotations

import sys

import torch
from ours import Steps, batch_of, model_of
from systems import SYSTEMS
from timing import hand_over, step_seconds
from torch.utils.flop_counter import FlopCounterMode

PRECISIONS = ("float32", "tf32", "bf16")
SIDE = 8192
"""Side of the matrices with which the peak is measured; a sixteenth of it on a CPU."""


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak(device: str, precision: str) -> float:
    """Return the floating-point operations per second of a product of large matrices."""
    side = SIDE if device != "cpu" else SIDE // 16
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    def multiply() -> None:
        a @ a
        wait(device)

    return 2.0 * side**3 / min(step_seconds(multiply, 5))


def main() -> None:
    repeats, device = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cuda"
    handed: dict[str, list[float]] = {}
    for precision in PRECISIONS:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        handed[f"peak_{precision}"] = [peak(device, precision)]
        for name in SYSTEMS:
            batch = batch_of(name, 1).to(device)
            for mode in ("eager", "compiled"):
                model = model_of(1).to(device)
                model.autocast = torch.bfloat16 if precision == "bf16" else None
                steps = Steps(model, batch, compiled=mode == "compiled")
                for kind in ("train", "infer"):
                    step = getattr(steps, kind)

                    def timed(step: object = step) -> None:
                        step()  # type: ignore[operator]
                        wait(device)

                    handed[f"{mode}_{kind}_{name}_{precision}"] = step_seconds(timed, repeats)
                    if mode == "eager":
                        with FlopCounterMode(display=False) as counter:
                            step()
                        handed[f"flops_{kind}_{name}_{precision}"] = [float(counter.get_total_flops())]
    hand_over(handed)


if __name__ == "__main__":
    main()
