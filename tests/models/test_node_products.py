"""Products of node features: the kernels against plain PyTorch and finite differences."""

from __future__ import annotations

import pytest
import torch
from structures import batch_of, rattled_molecule, small_model, to_structure
from torch import Tensor

from hydrazero.models.encoders.degree_features import DegreeMix
from hydrazero.models.encoders.matrix_features import changed, coefficients, matrices, normalised_products
from hydrazero.models.ops.kernels import FEATURE_TILE, load_kernels
from hydrazero.models.ops.node_products import Step, degree_linear, matrix_step

ATOMS = 40  # more than a thread takes at a time


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def by_matrices(a: Tensor, b: Tensor, kind: Step) -> Tensor:
    """The coefficients of a step, by PyTorch's products of matrices."""
    first, second = (matrices(x).permute(2, 3, 0, 1) for x in (a, b))
    if kind == Step.ANTICOMMUTATOR:
        out = coefficients((first @ second + second @ first).permute(2, 3, 0, 1))
    else:
        out = coefficients((first + second + second @ second).permute(2, 3, 0, 1))
    return out if kind == Step.RESIDUAL else out / (out.square().sum(1, keepdim=True) + 1.0)


def plain_step(a: Tensor, b: Tensor, kind: Step, *, kernels: bool = False) -> Tensor:
    """A step by the functions that the encoder calls."""
    if kind == Step.ANTICOMMUTATOR:
        return normalised_products(a, b, kernels=kernels)
    return changed(a, b, normalise=kind == Step.NORMALISED_RESIDUAL, kernels=kernels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", Step)
def test_steps_are_those_of_matrices(kind, dtype):
    a, b = (random(ATOMS, 9, features, dtype=dtype)[..., :48] for features in (48, 64))
    wanted = by_matrices(a, b, kind)
    for kernels in (False, True):
        torch.testing.assert_close(plain_step(a, b, kind, kernels=kernels), wanted)


@pytest.mark.parametrize("kind", Step)
def test_steps_of_kernels_and_two_derivatives_are_those_of_plain_pytorch(kind):
    """For operands in the order of components before atoms too, and for gradients without strides."""
    operands = [random(9, ATOMS, 32).transpose(0, 1), random(ATOMS, 9, 32)]
    results = []
    for kernels in (False, True):
        leaves = [x.clone().requires_grad_() for x in operands]
        out = plain_step(*leaves, kind, kernels=kernels)
        first = torch.autograd.grad(out.square().sum() + out.sum(), leaves, create_graph=True)
        loss = sum(part.square().sum() for part in first)
        results.append([out, *first, *torch.autograd.grad(loss, leaves)])
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", Step)
def test_derivatives_of_steps_are_finite_differences(kind):
    def step(a: Tensor, b: Tensor) -> Tensor:
        return matrix_step(a, b, kind)

    operands = (random(2, 9, 16).requires_grad_(), random(2, 9, 17)[..., 1:].requires_grad_())
    assert torch.autograd.gradcheck(step, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(step, operands, fast_mode=True)


def test_third_derivatives_of_steps_are_refused():
    a = random(2, 9, 16).requires_grad_()
    value = matrix_step(a, a, Step.ANTICOMMUTATOR)
    for _ in range(2):
        value = torch.autograd.grad(value.square().sum(), a, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no third derivatives"):
        value.sum().backward()


@pytest.mark.parametrize("features", [8, 24])
def test_features_without_a_tile_are_left_to_plain_pytorch(features):
    a, b = random(3, 9, features), random(3, 9, features + 1)[..., 1:]
    for kind in Step:
        assert torch.equal(plain_step(a, b, kind, kernels=True), plain_step(a, b, kind))
        with pytest.raises(RuntimeError, match=f"features is {features}; it must be a multiple of {FEATURE_TILE}"):
            matrix_step(a, b, kind)


def test_degrees_mixed_by_kernels_are_those_of_plain_pytorch():
    """With their derivatives, from either order of axes and from gradients without strides."""
    mix = DegreeMix(3, 24).double()
    for x in (random(ATOMS, 16, 24), random(16, ATOMS, 24).transpose(0, 1)):
        results = []
        for kernels in (False, True):
            leaf = x.clone().requires_grad_()
            out = mix(leaf, kernels=kernels)
            first = torch.autograd.grad(out.square().sum() + out.sum(), [leaf, mix.weight], create_graph=True)
            loss = sum(part.square().sum() for part in first)
            results.append([out, *first, *torch.autograd.grad(loss, [leaf, mix.weight])])
        for plain, found in zip(*results, strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-11)


def test_gradients_of_weights_in_bfloat16_are_rounded_once():
    x, g = (random(ATOMS, 16, 16).bfloat16() for _ in range(2))
    weight = random(4, 16, 16).bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(degree_linear(x, weight), weight, g)
    wide = weight.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(degree_linear(x.float(), wide), wide, g.float())
    assert torch.equal(found, exact.bfloat16())


def test_degree_products_are_each_others_derivatives():
    x, weight = random(3, 9, 4).requires_grad_(), random(3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(degree_linear, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(degree_linear, (x, weight), fast_mode=True)


def test_a_product_of_no_atoms_is_empty():
    x, weight = random(0, 9, 16).requires_grad_(), random(3, 16, 16).requires_grad_()
    out = matrix_step(x, degree_linear(x, weight), Step.RESIDUAL)
    assert out.shape == (0, 9, 16)
    assert all(not part.abs().sum() for part in torch.autograd.grad(out.sum(), (x, weight)))


def test_operands_that_do_not_fit_together_are_refused():
    operator = torch.ops.hydrazero.matrix_step
    for wrong, said in (
        (random(3, 8, 16), "must be .atoms, 9, features."),
        (random(9, 16), "must be .atoms, 9, features."),
        (random(2, 9, 16), "must have the same shape"),
        (random(3, 9, 16, dtype=torch.float32), "must have the same shape and precision"),
    ):
        operands = (wrong, wrong) if "atoms" in said else (random(3, 9, 16), wrong)
        with pytest.raises(RuntimeError, match=f"matrices.* {said}"):
            operator(*operands, 0)
    with pytest.raises(RuntimeError, match="there is no step of kind 3"):
        operator(random(3, 9, 16), random(3, 9, 16), 3)
    with pytest.raises(RuntimeError, match=r"features must be \[atoms, 4, features\] for matrices of 2 degrees"):
        degree_linear(random(3, 9, 16), random(2, 16, 16))


def test_autocast_rounds_products_of_degrees_but_not_those_of_matrices():
    x, mix = random(3, 9, 16, dtype=torch.float32), DegreeMix(2, 16)
    exact = mix(x, kernels=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, plain = mix(x, kernels=True), mix(x)
        assert rounded.dtype == plain.dtype == torch.bfloat16
        product = matrix_step(rounded, x, Step.ANTICOMMUTATOR)
    torch.testing.assert_close(rounded, plain)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.05)
    assert product.dtype == torch.float32


def test_bfloat16_forces_of_kernels_are_close_to_exact_ones():
    batch = batch_of([to_structure(rattled_molecule())], dtype=torch.float32)
    found = []
    for autocast, kernels in ((None, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = small_model("tensornet", features=32, dtype=torch.float32)
        model.autocast, model.kernels = autocast, kernels
        found.append(model(batch).forces)
    exact, *rounded = found
    errors = [float((forces - exact).norm() / exact.norm()) for forces in rounded]
    assert all(0.0 < error < 0.05 for error in errors)
