"""Products of node features: the kernels against plain PyTorch and finite differences."""

from __future__ import annotations

import pytest
import torch
from structures import batch_of, rattled_molecule, small_model, to_structure
from torch import Tensor

from hydrazero.models.encoders import matrix_features
from hydrazero.models.encoders.degree_features import DegreeMix
from hydrazero.models.encoders.matrix_features import coefficients, matrices
from hydrazero.models.ops import node_products
from hydrazero.models.ops.kernels import FEATURE_TILE, load_kernels
from hydrazero.models.ops.node_products import degree_linear

ATOMS = 40  # more than a thread takes at a time


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def by_matrices(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    """The coefficients of AB + BA, or with B^T for B, by PyTorch's products of matrices."""
    first, second = (matrices(x).permute(2, 3, 0, 1) for x in (a, b))
    second = second.mT if transposed else second
    return coefficients((first @ second + second @ first).permute(2, 3, 0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_anticommutators_are_those_of_matrices(dtype, transposed):
    a, b = (random(ATOMS, 9, features, dtype=dtype)[..., :48] for features in (48, 64))
    found = torch.ops.hydrazero.matrix_anticommutator(a, b, transposed)
    torch.testing.assert_close(found, by_matrices(a, b, transposed))


@pytest.mark.parametrize("product", ["anticommutator", "square", "normalised"])
def test_matrix_products_of_kernels_are_those_of_plain_pytorch(product):
    """In the order of components before atoms too, in which operands are not dense."""
    function = getattr(matrix_features, product)
    operands = [random(9, ATOMS, 32).transpose(0, 1), random(ATOMS, 9, 32)][: 2 if product == "anticommutator" else 1]
    plain, found = (function(*operands, kernels=kernels) for kernels in (False, True))
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("features", [8, 24])
def test_features_without_a_tile_are_left_to_plain_pytorch(features):
    a, b = random(3, 9, features), random(3, 9, features + 1)[..., 1:]
    for name, operands in (("anticommutator", (a, b)), ("square", (a,)), ("normalised", (a,))):
        product = getattr(matrix_features, name)
        assert torch.equal(product(*operands, kernels=True), product(*operands))
        with pytest.raises(RuntimeError, match=f"features is {features}; it must be a multiple of {FEATURE_TILE}"):
            getattr(node_products, name)(*operands)


def test_matrix_products_are_each_others_derivatives():
    """First, second and third derivatives by finite differences."""
    a, b = (x.requires_grad_() for x in (random(2, 9, 16), random(2, 9, 17)[..., 1:]))
    for product, operands in ((node_products.anticommutator, (a, b)), (node_products.square, (a,))):
        assert torch.autograd.gradcheck(product, operands, fast_mode=True)
        assert torch.autograd.gradgradcheck(product, operands, fast_mode=True)

    def gradients(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        out = node_products.anticommutator(a, b).square().sum()
        return torch.autograd.grad(out, (a, b), create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, (a, b), fast_mode=True)


def test_first_to_third_derivatives_of_normalised_matrices_are_those_of_plain_pytorch():
    results = []
    for kernels in (False, True):
        found = [random(3, 9, 16).requires_grad_()]
        value = matrix_features.normalised(found[0], kernels=kernels)
        for order in range(3):
            found.append(value)
            value = torch.autograd.grad(
                (value * random(3, 9, 17 + order)[..., :16]).sum(), found[0], create_graph=True
            )[0]
        results.append([*found[1:], value])
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-12, atol=1e-12)
    x = random(3, 9, 16).requires_grad_()
    assert torch.autograd.gradcheck(node_products.normalised, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(node_products.normalised, x, fast_mode=True)


def test_degrees_mixed_by_kernels_are_those_of_plain_pytorch():
    """With their derivatives, from either order of axes and from gradients without strides."""
    mix = DegreeMix(3, 24).double()
    for x in (random(16, ATOMS, 24), random(ATOMS, 16, 24).transpose(0, 1)):
        results = []
        for kernels in (False, True):
            leaf = x.clone().requires_grad_()
            out = mix(leaf, kernels=kernels)
            first = torch.autograd.grad(out.square().sum() + out.sum(), [leaf, mix.weight], create_graph=True)
            loss = sum(part.square().sum() for part in first)
            results.append([out, *first, *torch.autograd.grad(loss, [leaf, mix.weight])])
        for plain, found in zip(*results, strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-11)


def test_degree_products_are_each_others_derivatives():
    x, weight = random(3, 9, 4).requires_grad_(), random(3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(degree_linear, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(degree_linear, (x, weight), fast_mode=True)


def test_a_product_of_no_atoms_is_empty():
    x, weight = random(0, 9, 16).requires_grad_(), random(3, 16, 16).requires_grad_()
    out = node_products.square(degree_linear(x, weight))
    assert out.shape == (0, 9, 16)
    assert all(not part.abs().sum() for part in torch.autograd.grad(out.sum(), (x, weight)))


def test_operands_that_do_not_fit_together_are_refused():
    for wrong in (random(3, 8, 16), random(2, 9, 16), random(9, 16)):
        with pytest.raises(RuntimeError, match=r"matrices must be \[atoms, 9, features\]"):
            torch.ops.hydrazero.matrix_anticommutator(random(3, 9, 16), wrong, False)
    with pytest.raises(RuntimeError, match=r"features must be \[atoms, 4, features\] for matrices of 2 degrees"):
        degree_linear(random(3, 9, 16), random(2, 16, 16))


def test_autocast_rounds_products_of_degrees_but_not_those_of_matrices():
    x, mix = random(9, 3, 16, dtype=torch.float32), DegreeMix(2, 16)
    exact = mix(x, kernels=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, plain = mix(x, kernels=True), mix(x)
        assert rounded.dtype == plain.dtype == torch.bfloat16
        product = node_products.anticommutator(rounded.transpose(0, 1), x.transpose(0, 1))
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
