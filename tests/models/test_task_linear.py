"""Products of rows with their own task's matrix in plain PyTorch: blocks of one task, derivatives, no waste."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from hydrazero.models.heads.task_linear import TaskLinear, TaskRows, task_blocks
from hydrazero.models.ops.compiled import compile_traced

ROWS_OF_TASKS = st.integers(1, 6).flatmap(
    lambda count: st.tuples(st.lists(st.integers(0, count - 1), min_size=1, max_size=200), st.just(count))
)


@given(ROWS_OF_TASKS)
def test_a_block_has_rows_of_one_task_and_each_row_one_place(rows_of_tasks):
    tasks, count = rows_of_tasks
    task = torch.tensor(tasks)
    blocks = task_blocks(task, count)
    assert len(blocks.place.unique()) == len(tasks)
    assert torch.equal(blocks.task[blocks.place // blocks.height], task)
    rows = torch.randn(len(tasks), 2, dtype=torch.float64)
    assert torch.equal(blocks.scatter(blocks.gather(rows)), rows)
    assert blocks.gather(rows).sum() == pytest.approx(float(rows.sum()), abs=1e-9)


@given(ROWS_OF_TASKS)
def test_products_are_those_of_each_row_alone(rows_of_tasks):
    tasks, count = rows_of_tasks
    task, layer = torch.tensor(tasks), TaskLinear(count, 3, 5).double()
    x = torch.randn(len(tasks), 3, dtype=torch.float64)
    alone = torch.einsum("noi,ni->no", layer.weight[task], x) + layer.bias[task]
    torch.testing.assert_close(layer(x, TaskRows(task=task, count=count)), alone)


@pytest.mark.parametrize("tasks", [[0, 2, 2, 0, 0, 2, 2], [0, 0, 0]], ids=["of three tasks", "of one"])
def test_derivatives_are_exact_twice(tasks):
    task = torch.tensor(tasks)
    rows = TaskRows(task=task, count=1 + max(tasks))
    x = torch.randn(len(tasks), 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows.count, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(rows.matmul, (x, weight))
    assert gradgradcheck(rows.matmul, (x, weight))


def test_rows_do_not_go_through_the_matrices_of_all_tasks():
    task = torch.arange(16).repeat_interleave(70)
    rows, layer = TaskRows(task=task, count=16), TaskLinear(16, 8, 8)
    with FlopCounterMode(display=False) as counter:
        rows.matmul(torch.randn(len(task), 8), layer.weight)
    assert counter.get_total_flops() <= 2 * (2 * len(task) * 8 * 8)


@pytest.mark.compiler
def test_compiled_products_are_the_same():
    """As on a GPU, where there are no kernels of our own; in float64, as compiled sums have another order."""

    def gradients(tensors):
        x, weight, task = tensors
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        energy = torch.tanh(TaskRows(task=task, count=4).matmul(x, weight)).sum()
        (found,) = torch.autograd.grad(energy, x, create_graph=True)
        return torch.autograd.grad(found.square().sum(), (x, weight))

    inputs = [
        torch.randn(300, 6, dtype=torch.float64),
        torch.randn(4, 7, 6, dtype=torch.float64),
        torch.randint(0, 4, (300,)),
    ]
    torch.testing.assert_close(compile_traced(gradients, inputs)(inputs), gradients(inputs))
