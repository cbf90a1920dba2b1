"""Training on a GPU: the same to the bit in every run, and what the CPU computes. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from test_compiled import gradients, labelled_batch, trained_model

from hydrazero.models.encoders import ENCODERS
from hydrazero.models.ops.slots import Segments, sum_in_order
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")


def on_gpu(encoder: str, dtype: torch.dtype, compiled: bool) -> ModelWithLoss:
    trained = trained_model(encoder, "cuda", dtype=dtype)
    if compiled:
        trained.compile_steps()
    return trained


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_steps_are_the_same_to_the_bit(encoder, compiled):
    batch = labelled_batch(torch.float32).to("cuda")
    trained = on_gpu(encoder, torch.float32, compiled)
    _, first = gradients(trained, batch)
    for _ in range(5):
        _, again = gradients(trained, batch)
        for name, gradient in first.items():
            assert torch.equal(gradient, again[name]), name


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_steps_are_those_of_the_cpu(encoder, compiled):
    batch = labelled_batch()
    loss, expected = gradients(trained_model(encoder), batch)
    found_loss, found = gradients(on_gpu(encoder, torch.float64, compiled), batch.to("cuda"))
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-10)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].cpu(), gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_sums_in_order_are_sums(device):
    """As used on a GPU alone; owners without items, and items at the end, among them."""
    owner = torch.tensor([0, 0, 2, 2, 2, 5], device=device)
    values = torch.randn(6, 3, dtype=torch.float64, device=device)
    expected = torch.zeros(7, 3, dtype=torch.float64, device=device).index_add(0, owner, values)
    torch.testing.assert_close(sum_in_order(Segments(owner=owner, count=7), values), expected)
    graph = torch.compile(lambda o, v: sum_in_order(Segments(owner=o, count=7), v), fullgraph=True)
    torch.testing.assert_close(graph(owner, values), expected)
