"""Products on the sphere: exact integrals, and kernels that equal plain PyTorch in values and derivatives."""

import itertools

import pytest
import torch

from hydrazero.models.encoders.harmonics import coupling, degree_slice, sphere_tables
from hydrazero.models.ops.kernels import load_kernels
from hydrazero.models.ops.sphere_products import POINT_TILE, Sphere, sphere_product

ATOMS, FEATURES = 5, 16


@pytest.fixture(autouse=True, scope="module")
def loaded_kernels():
    load_kernels()


def sphere_of(degree: int, exact: int, dtype: torch.dtype = torch.float64) -> Sphere:
    harmonics, weights = sphere_tables(degree, exact, POINT_TILE)
    return Sphere(
        harmonics=torch.tensor(harmonics, dtype=dtype).contiguous(), weights=torch.tensor(weights, dtype=dtype)
    )


def functions(factors: int, components: int, features: int = FEATURES) -> list[torch.Tensor]:
    torch.manual_seed(factors)
    return [torch.randn(ATOMS, components, features, dtype=torch.float64) for _ in range(factors)]


@pytest.mark.parametrize("kernels", [False, True])
def test_products_of_two_functions_couple_their_degrees(kernels):
    a, b = functions(2, 9)
    found = sphere_product([a, b], sphere_of(2, 5), 4, kernels=kernels)
    for first, second, out in itertools.product(range(3), range(3), range(2)):
        parts = [torch.zeros_like(a), torch.zeros_like(b)]
        for part, whole, degree in zip(parts, (a, b), (first, second), strict=True):
            part[:, degree_slice(degree)] = whole[:, degree_slice(degree)]
        one = sphere_product(parts, sphere_of(2, 5), 4, kernels=kernels)[:, degree_slice(out)]
        table = torch.tensor(coupling(first, second, out))
        expected = torch.einsum("abc,naf,nbf->ncf", table, a[:, degree_slice(first)], b[:, degree_slice(second)])
        if table.abs().max() == 0:
            assert one.abs().max() < 1e-12
        else:  # the table is of unit norm
            ratio = (one * expected).sum() / expected.square().sum()
            torch.testing.assert_close(one, ratio * expected, rtol=1e-9, atol=1e-12)
            assert ratio > 0
    assert found.shape == (ATOMS, 4, FEATURES)


@pytest.mark.parametrize(("factors", "degree"), [(2, 3), (3, 3), (3, 2), (4, 1)])
@pytest.mark.parametrize("features", [16, 48])
def test_kernels_and_their_derivatives_are_those_of_plain_pytorch(factors, degree, features):
    """Of first and second derivatives; from operands whose components lie in another order, too."""
    sphere = sphere_of(degree, degree * factors + 1)
    results = []
    for kernels in (False, True):
        inputs = [
            x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
            for x in functions(factors, (degree + 1) ** 2, features)
        ]
        out = sphere_product(inputs, sphere, 4, kernels=kernels)
        first = torch.autograd.grad((out * out.sin()).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((g * g.cos()).sum() for g in first), inputs)
        results.append([out, *first, *second])
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-11, atol=1e-11 * float(plain.detach().abs().max()))


def test_gradients_by_finite_differences():
    sphere = sphere_of(1, 4)
    inputs = [x[:2].requires_grad_() for x in functions(3, 4)]

    def product(*factors):
        return sphere_product(factors, sphere, 4, kernels=True)

    assert torch.autograd.gradcheck(product, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(product, inputs, fast_mode=True)


def test_third_derivatives_are_those_of_plain_pytorch():
    sphere = sphere_of(1, 4)
    results = []
    for kernels in (False, True):
        inputs = [x.requires_grad_() for x in functions(3, 4)]
        value = sphere_product(inputs, sphere, 4, kernels=kernels).sin().sum()
        for _ in range(2):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, inputs, create_graph=True))
        results.append(torch.autograd.grad(value, inputs))
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-10, atol=1e-10 * float(plain.abs().max()))


def test_float32_is_as_exact_as_plain_pytorch():
    sphere = sphere_of(3, 10, torch.float32)
    inputs = [x.float() for x in functions(3, 16)]
    exact = sphere_product(functions(3, 16), sphere_of(3, 10), 4)
    for kernels in (False, True):
        found = sphere_product(inputs, sphere, 4, kernels=kernels)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_operands_that_do_not_fit_are_refused():
    sphere = sphere_of(1, 4)
    a, b = functions(2, 4)
    calls = torch.ops.hydrazero.sphere_product
    with pytest.raises(RuntimeError, match="2 to 4 factors"):
        calls([a], sphere.harmonics, sphere.weights, 4)
    with pytest.raises(RuntimeError, match="features is 8; it must be a multiple of 16"):
        calls([a[..., :8], b[..., :8]], sphere.harmonics, sphere.weights, 4)
    with pytest.raises(RuntimeError, match="functions must be"):
        calls([a, b[1:]], sphere.harmonics, sphere.weights, 4)
    with pytest.raises(RuntimeError, match="functions must be"):
        calls([a, torch.cat([b, b], 1)], sphere.harmonics, sphere.weights, 4)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        calls([a, b], sphere.harmonics[:, :7].contiguous(), sphere.weights[:7].contiguous(), 4)
    with pytest.raises(RuntimeError, match="type of the functions"):
        calls([a.float(), b.float()], sphere.harmonics, sphere.weights, 4)
