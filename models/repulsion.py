"""Repulsion of nuclei at short range, which keeps atoms apart at distances that are absent from the training data."""

from __future__ import annotations

import numpy as np
import torch
from ase.data import covalent_radii
from ase.units import Bohr, Hartree
from torch import Tensor, nn

from hydrazero.models.encoders.base import PairGeometry
from hydrazero.models.ops.slots import Slots
from hydrazero.shards.structure import MAX_ATOMIC_NUMBER

SCREENING = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
"""Factors and exponents of the universal screening function phi."""
COULOMB = Hartree * Bohr
"""The Coulomb constant e² / (4 pi epsilon_0) in eV Å."""


class ZieglerBiersackLittmark(nn.Module):
    """Screened nuclear repulsion (Ziegler, Biersack, Littmark 1985), zero beyond the sum of the covalent radii.

    A pair's energy is COULOMB Z_i Z_j / r * phi(r / a), a = 0.8854 Bohr / (Z_i^0.23 + Z_j^0.23), times a polynomial
    that is 1 at 0 and has value, slope and curvature 0 at the sum of the covalent radii (Gasteiger et al. 2020,
    DimeNet, eq. 8, p = 6).
    """

    radii: Tensor
    """Covalent radii in Å by atomic number, [119]."""

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        # Not persistent: constants of nature need not be stored in files.
        radii = torch.from_numpy(np.array(covalent_radii[: MAX_ATOMIC_NUMBER + 1], dtype=np.float64))
        self.register_buffer("radii", radii, persistent=False)

    def forward(self, numbers: Tensor, pairs: PairGeometry) -> Tensor:
        """Return the energy of each atom in eV, [A], which is half of the energy of its pairs."""
        slots: Slots = pairs.slots
        distance = pairs.distances
        charge = numbers.to(distance.dtype)
        own, other = slots.spread(charge).unsqueeze(1), slots.gather(charge)
        radii = self.radii.to(distance.dtype)[numbers]
        reach = (slots.spread(radii).unsqueeze(1) + slots.gather(radii)).clamp(max=self.cutoff)
        length = 0.8854 * Bohr / (own.pow(0.23) + other.pow(0.23)).clamp(min=1.0)
        screening = sum(factor * torch.exp(-exponent * distance / length) for factor, exponent in SCREENING)
        x = distance / reach.clamp(min=1e-3)
        inside = torch.where(x < 1, 1.0 - 28.0 * x**6 + 48.0 * x**7 - 21.0 * x**8, torch.zeros_like(x)) * slots.mask
        return slots.sum_rows((0.5 * COULOMB * own * other / distance * screening * inside).sum(1))
