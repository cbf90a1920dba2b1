"""Sums over neighbours: the kernels against plain PyTorch and finite differences, and their symmetry under rotation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ase import Atoms
from structures import batch_of, rattled_crystal, rattled_molecule, small_model, to_structure
from torch import Tensor
from torch.nn.functional import normalize

from hydrazero.models.encoders.degree_features import by_degree
from hydrazero.models.encoders.harmonics import solid_harmonics
from hydrazero.models.ops.compiled import slow_sums, use_kernels
from hydrazero.models.ops.kernels import KERNEL_DEGREE, load_kernels
from hydrazero.models.ops.pair_sums import PairFactors, Path, pair_sum
from hydrazero.models.ops.slots import slots_of

DEGREES = range(KERNEL_DEGREE + 1)
PATHS = ("all", "scalars and degree 0", "scalars", "tensors", "scalars and tensors without degree 0")
FUNCTIONS, FEATURES = 3, 16
WIDE = {1: (21, 48), 2: (9, 32), 3: (33, 32)}
"""Numbers of radial functions and of features, by degree, with which several tiles and blocks are summed."""


class Case:
    """Random operands of the form for the pairs of a molecule, whose opposite slots agree as those of a model do."""

    def __init__(
        self, degree: int, paths: str, atoms: Atoms | None = None, size: tuple[int, int] | None = None
    ) -> None:
        load_kernels()
        functions, features = size or (FUNCTIONS, FEATURES)
        batch = batch_of([to_structure(atoms or rattled_molecule("H2O"))], extra=(0, 2, 1))
        self.slots = slots_of(batch, kernels=True)
        self.degree = degree
        generator = torch.Generator().manual_seed(degree)
        count = self.slots.mask.numel()
        place = torch.arange(count).view_as(self.slots.reverse)
        self.pair = torch.minimum(place, self.slots.reverse)
        parity = torch.tensor([float(each % 2) for each in range(1, degree + 1) for _ in range(2 * each + 1)])
        first = torch.where(place == self.pair, 1.0, 0.0).unsqueeze(-1)
        self.sign = (1.0 - 2.0 * (1.0 - first) * parity).double()

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        components, number = (degree + 1) ** 2, self.slots.atoms
        held = {"all": (0, components), "scalars and degree 0": (0, 1), "scalars": None, "tensors": (0, components)}
        span = held.get(paths, (1, components))
        self.inputs = [random(count, functions), random(count, components - 1)]
        self.tensors = span is not None and span[1] > span[0]
        self.scalars = paths != "tensors" and degree > 0
        if span is not None and self.tensors:
            degrees = 1 if span[1] == 1 else degree + 1 - span[0]
            self.inputs += [random(functions, degrees * features), random(number, span[1] - span[0], features)]
        if self.scalars:
            self.inputs += [random(functions, degree * features), random(number, degree, features)]

    def sum(self, radial: Tensor, harmonics: Tensor, *paths: Tensor, kernels: bool = True) -> Tensor:
        """Return the sum of seeds [slots, ...] and of the weights and features of each path."""
        holds = self.slots.mask.unsqueeze(-1)
        pairs = PairFactors(
            slots=replace(self.slots, kernels=kernels),
            radial=radial[self.pair] * holds,
            harmonics=harmonics[self.pair] * self.sign * holds,
        )
        found = [Path(weight=weight, features=x) for weight, x in zip(paths[::2], paths[1::2], strict=True)]
        return pair_sum(pairs, found[0] if self.tensors else None, found[-1] if self.scalars else None)


def cases() -> list[tuple[int, str]]:
    """Every degree with every choice of paths that has something to sum."""
    return [(degree, paths) for degree in DEGREES for paths in PATHS if degree or paths in ("all", "tensors")]


@pytest.mark.parametrize(("degree", "paths"), cases())
def test_kernels_and_their_derivatives_are_those_of_plain_pytorch(degree, paths):
    agree(Case(degree, paths, rattled_molecule("C6H6")))


@pytest.mark.parametrize("degree", WIDE)
def test_kernels_of_many_atoms_features_and_radial_functions(degree):
    agree(Case(degree, "all", rattled_crystal() * (3, 3, 1), WIDE[degree]))


def agree(case: Case) -> None:
    """Fail unless kernels and plain PyTorch have the same sums and second derivatives."""
    results = []
    for kernels in (False, True):
        out = case.sum(*case.inputs, kernels=kernels)
        first = torch.autograd.grad(out.square().sum(), case.inputs, create_graph=True, allow_unused=True)
        loss = sum((part**2).sum() for part in first if part is not None)
        results.append([out, *torch.autograd.grad(loss, case.inputs, allow_unused=True)])
    for plain, kernel in zip(*results, strict=True):
        assert (plain is None or not plain.abs().sum()) == (kernel is None or not kernel.abs().sum())
        if plain is not None and kernel is not None:
            assert torch.allclose(kernel, plain, rtol=1e-10, atol=1e-10 * float(plain.detach().abs().max()))


def test_operands_need_not_be_dense():
    """Gradients of a plain sum of the result have no strides, and neither do expanded features and weights."""
    case = Case(2, "all")
    radial, harmonics, w, x, v, d = case.inputs
    expanded = [radial, harmonics, w[:, :1].expand(w.shape), x[:, :1].expand(x.shape), v.t().contiguous().t(), d]
    found = [case.sum(*expanded, kernels=kernels) for kernels in (False, True)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(out.sum(), case.inputs) for out in found]
    for plain, kernel in zip(*gradients, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, w, d: (x[:, :2], w, d), "tensors have 2 components"),
        (lambda x, w, d: (x, w[:, :16], d), r"weights must be \[3, 48\]"),
        (lambda x, w, d: (x, w, d[:, :1]), "there are scalars for 1 degrees; there must be 2"),
        (lambda x, w, d: (x, w, d[:2]), "features must be"),
    ],
)
def test_operands_that_do_not_fit_together_are_refused(change, said):
    case = Case(2, "all")
    radial, harmonics, w, x, v, d = (each.detach() for each in case.inputs)
    x, w, d = change(x, w, d)
    with pytest.raises(RuntimeError, match=said):
        case.sum(radial, harmonics, w, x, v, d)


@pytest.mark.parametrize(("degree", "paths"), [(1, "all"), (1, "scalars"), (2, "all"), (3, "scalars and degree 0")])
def test_operators_are_each_others_derivatives(degree, paths):
    """First and second derivatives of the kernels, by finite differences."""
    case = Case(degree, paths)
    assert torch.autograd.gradcheck(case.sum, case.inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.sum, case.inputs, fast_mode=True)


@pytest.mark.parametrize("degree", DEGREES)
def test_sums_turn_with_the_directions(degree):
    """The norms of each degree of a sum stay as they are if directions are turned or mirrored."""
    case = Case(degree, "scalars and degree 0" if degree else "all")
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    vectors = normalize(torch.randn(case.slots.mask.numel(), 3, generator=generator).double(), dim=-1)
    found = []
    for directions in (vectors, vectors @ turn.T, -vectors):
        out = case.sum(case.inputs[0], solid_harmonics(directions, degree)[:, 1:], *case.inputs[2:])
        found.append(torch.stack([part.square().sum(1) for part in by_degree(out, 1)]))
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-10, atol=1e-12)


def test_a_degree_beyond_the_kernels_is_summed_by_plain_pytorch():
    case = Case(KERNEL_DEGREE + 1, "all")
    assert torch.equal(case.sum(*case.inputs), case.sum(*case.inputs, kernels=False))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"features": 24}, "model.features = 24 is not a multiple of 16"),
        ({"encoder": "lace", "max_degree": 5}, "model.max_degree = 5 is above 4"),
        ({"encoder": "schnet", "features": 24}, None),
        ({"encoder": "lace", "max_degree": 4}, None),
    ],
)
def test_what_the_kernels_do_not_sum_is_said(settings, said):
    model = small_model(**{"encoder": "painn", "features": 32, **settings})
    assert use_kernels(model) is None
    assert (slow_sums(model) or "").startswith(said or "")
    assert (slow_sums(model) is None) == (said is None)


def test_a_sum_of_nothing_is_refused():
    case = Case(1, "all")
    pairs = PairFactors(slots=case.slots, radial=torch.zeros(1, 8, 2), harmonics=torch.zeros(1, 8, 3))
    with pytest.raises(ValueError, match="needs tensors or scalars"):
        pair_sum(pairs, None, None)
