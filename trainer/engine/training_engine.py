"""A type for the part of DeepSpeed's engine that is used here; DeepSpeed itself is not typed."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss


class TrainingEngine(Protocol):
    """A model with its optimizer and schedule, spread over ranks; `make_engine` returns one.

    What DeepSpeed does not document of its engine and its optimizers is used by `ZeroLayout` alone.
    """

    module: ModelWithLoss
    communication_data_type: Any
    """Type in which gradients are summed over ranks."""
    optimizer: Any
    """DeepSpeed's optimizer; its type depends on the ZeRO stage and the precision."""
    lr_scheduler: Any
    """Schedule of the learning rate; None if there is none."""
    global_steps: int
    """Number of optimizer steps so far, skipped ones among them."""
    global_samples: int
    """Number of batches so far, of all ranks."""
    micro_steps: int
    """Number of batches so far, of each rank."""
    skipped_steps: int
    """Number of optimizer steps that changed no weight."""

    def __call__(self, batch: GraphBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the module returns."""

    def backward(self, loss: Tensor) -> Any:
        """Add the gradient of a loss to those of the batches before."""

    def step(self) -> Any:
        """Do an optimizer step once enough batches have been accumulated."""

    def zero_grad(self) -> None:
        """Discard gradients."""

    def train(self) -> Any:
        """Put the module into training mode."""

    def eval(self) -> Any:
        """Put the module into evaluation mode."""

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage; 0 without ZeRO."""

    def fp16_enabled(self) -> bool:
        """Return whether weights are float16."""

    def gradient_accumulation_steps(self) -> int:
        """Return the number of batches of each rank in a step."""

    def gradient_clipping(self) -> float:
        """Return the largest norm of a gradient; 0 without a limit."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the batch at hand is the last one of a step."""

    def get_lr(self) -> list[float]:
        """Return the learning rate of each group of parameters."""

    def get_global_grad_norm(self) -> Any:
        """Return the norm of the last step's gradient, a number or a tensor; None before the first step."""

    def save_checkpoint(self, save_dir: str, tag: str, *, save_latest: bool) -> Any:
        """Write the files of a checkpoint; called on every rank."""

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, Any]:
        """Read the files of a checkpoint; the first value is None if that is not possible. Called on every rank."""
