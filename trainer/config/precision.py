"""Training precisions: which one a DeepSpeed JSON selects, and what that means for the model and for DeepSpeed.

In all of them geometry, sums, heads, reference energies and losses are in float32 or float64, and so are the weights
that the optimizer updates and the sums of gradients over micro-batches and ranks.

    key in the JSON                                      weights     products of the encoder     master weights
    none                                                 float32     float32                     -
    "fp64": {"enabled": true}                            float64     float64                     float64
    "tf32": {"enabled": true}                            float32     TF32 (GPU)                  -
    "torch_autocast": {"enabled": true, "dtype": ...}    float32     bfloat16                    -
    "bf16": {"enabled": true}                            bfloat16    bfloat16                    float32
    "fp16": {"enabled": true}                            float16     float16, loss scaled (GPU)  float32

The keys fp64, tf32 and torch_autocast belong to hydrazero alone: `for_deepspeed` removes them for DeepSpeed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from hydrazero.shards.errors import ConfigError

OWN_KEYS = ("fp64", "tf32", "torch_autocast")
"""Keys that DeepSpeed does not get: its own autocast would include geometry, heads and losses."""
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
"""Values that a JSON with bf16 or fp16 must have, so that gradients are summed in float32."""
UNSAFE = {
    "bf16_master_weights_and_grads": "the master weights are float32",
    "bf16_optimizer_states": "the optimizer's states are float32",
    "fp16_master_weights_and_grads": "the master weights are float32",
    "auto_cast": "positions and labels are float32",
    "immediate_grad_update": "gradients are summed before they are used",
}
"""Switches of DeepSpeed's bf16 and fp16 tables that must stay off, and the reason."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A training precision."""

    key: str
    """Table of the JSON that selects it; empty for float32."""
    label: str
    """Name in tables and messages."""
    weights: torch.dtype = torch.float32
    """Type of the model and of batches before DeepSpeed casts weights; that of geometry, heads and losses."""
    encoder: torch.dtype | None = None
    """Type of the encoder's products, if it is lower than that of `weights`."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages that support it."""
    gpu: bool = False
    """Whether it needs a GPU."""
    instead: str = ""
    """Alternative for a machine without a GPU, for the message."""


FLOAT32 = Precision(key="", label="float32")
PRECISIONS = (
    FLOAT32,
    Precision(key="fp64", label="fp64", weights=torch.float64, stages=(1, 2, 3)),
    Precision(key="tf32", label="tf32", gpu=True, instead="float32, as in zero1"),
    Precision(key="torch_autocast", label="bfloat16 autocast", encoder=torch.bfloat16),
    Precision(key="bf16", label="bf16", encoder=torch.bfloat16, stages=(1, 2, 3)),
    Precision(
        key="fp16", label="fp16", encoder=torch.float16, stages=(1, 2, 3), gpu=True, instead="bf16, as in zero1_bf16"
    ),
)
"""All precisions, in the order of the table above."""
KEYS = tuple(precision.key for precision in PRECISIONS if precision.key)


def precision_of(document: dict[str, Any]) -> Precision:
    """Return the precision that a DeepSpeed JSON selects; raise ConfigError if runs do not support it."""
    for key in document:
        if key in ("amp", "bfloat16"):
            raise ConfigError(f"{key} is not supported; use one of {', '.join(KEYS)}.")
        if key not in KEYS and get_close_matches(key, KEYS, n=1, cutoff=0.75):
            close = get_close_matches(key, KEYS, n=1)[0]
            raise ConfigError(f"{key} is not known (did you mean '{close}'?).")
    wanted = [precision for precision in PRECISIONS if precision.key and _enabled(document, precision.key)]
    if len(wanted) > 1:
        raise ConfigError(f"{' and '.join(precision.key for precision in wanted)} are both enabled; choose one.")
    precision = wanted[0] if wanted else FLOAT32
    zero = document.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage in (0, 1, 2, 3) and stage not in precision.stages:
        stages = ", ".join(map(str, precision.stages))
        raise ConfigError(
            f"{precision.label} is supported with the ZeRO stages {stages}, not with {stage}; set "
            "zero_optimization.stage."
        )
    _check_table(precision, document)
    return precision


def _enabled(document: dict[str, Any], key: str) -> bool:
    value = document.get(key, {}).get("enabled", False)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}.enabled is {value!r}; it must be true or false.")
    return value


def _check_table(precision: Precision, document: dict[str, Any]) -> None:
    """Raise ConfigError for settings that would round values which must not be rounded."""
    table = document.get(precision.key, {})
    if precision.key in OWN_KEYS:
        known = {"enabled", "dtype"} if precision.key == "torch_autocast" else {"enabled"}
        for key in table:
            if key not in known:
                raise ConfigError(f"{precision.key}.{key} is not known; leave it out.")
    if precision.key == "torch_autocast" and table.get("dtype", "bfloat16") != "bfloat16":
        raise ConfigError(
            f"torch_autocast.dtype is {table['dtype']!r}; it must be 'bfloat16'; for float16 use fp16, which scales "
            "the loss."
        )
    for key, reason in UNSAFE.items():
        if table.get(key, False) is not False:
            raise ConfigError(f"{precision.key}.{key} must be off, since {reason}; leave it out.")
    if table.get("check_grad_overflow", True) is not True:
        raise ConfigError(
            f"{precision.key}.check_grad_overflow must be on, since steps whose gradient is not finite are skipped; "
            "leave it out."
        )
    if precision.key not in ("bf16", "fp16"):
        return
    for key, value in SUMS.items():
        if document.get(key, value) != value:
            raise ConfigError(f"{key} must be {value!r} with {precision.key}, since gradients are summed in float32.")


def for_deepspeed(document: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """Return the JSON for DeepSpeed: without hydrazero's own keys, and with gradients summed in float32 or float64.

    PyTorch's Adam goes over the weights once, unless the JSON says how; by default it does so ten times.
    """
    config = {key: value for key, value in copy.deepcopy(document).items() if key not in OWN_KEYS}
    if precision.key in ("bf16", "fp16"):
        config |= copy.deepcopy(SUMS)
    params = config.get("optimizer", {}).get("params", {})
    if params.get("torch_adam") and not any(params.get(key) for key in ("foreach", "capturable", "differentiable")):
        params.setdefault("fused", True)
    zero = config.setdefault("zero_optimization", {})
    if precision.weights == torch.float64:
        zero["reduce_scatter"] = False  # DeepSpeed's reduce-scatter does not support float64
    if zero.get("stage") == 3:
        # DeepSpeed would replace PyTorch's linear layer by one of its own, which rounds derivatives differently.
        zero.setdefault("memory_efficient_linear", False)
    return config


def check_device(precision: Precision, *, has_gpu: bool) -> None:
    """Raise ConfigError if the precision needs a GPU and there is none."""
    if precision.gpu and not has_gpu:
        raise ConfigError(
            f"{precision.label} needs a GPU, and this machine has none; choose another precision under [deepspeed], "
            f"such as {precision.instead}."
        )


def use_tf32(precision: Precision) -> None:
    """Switch TF32 on or off for products of float32 on a GPU; `models.ops.exact` excludes those that must be exact."""
    torch.backends.cuda.matmul.allow_tf32 = precision.key == "tf32"
