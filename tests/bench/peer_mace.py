"""Time of MACE (mace-torch) on a batch of screened structures with known neighbours; runs in its own environment."""

from __future__ import annotations

import sys

import numpy as np
import torch
from e3nn import o3
from mace import data, modules
from mace.tools import AtomicNumberTable, torch_geometric
from systems import CUTOFF, SCREENED, THREADS
from timing import hand_over, step_seconds

CHANNELS = 112
"""Number of channels with which MACE has about as many parameters as the other two models (PaiNN of 128 features)."""
ELEMENTS = [1, 6, 29]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return modules.ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=len(ELEMENTS),
        hidden_irreps=o3.Irreps(f"{CHANNELS}x0e + {CHANNELS}x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(len(ELEMENTS)),
        avg_num_neighbors=20.0,
        atomic_numbers=ELEMENTS,
        correlation=3,
        radial_type="bessel",
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    ).eval()


def main() -> None:
    repeats = int(sys.argv[1])
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.float32)
    painted, seconds, table = model(), {}, AtomicNumberTable(ELEMENTS)
    sys.stderr.write(f"MACE with {sum(p.numel() for p in painted.parameters()):,} parameters\n")
    for name, make in SCREENED.items():
        configs = [data.config_from_atoms(atoms) for atoms in make()]
        graphs = [data.AtomicData.from_config(config, z_table=table, cutoff=CUTOFF) for config in configs]
        (batch,) = torch_geometric.dataloader.DataLoader(dataset=graphs, batch_size=len(graphs), shuffle=False)
        for kind in ("energy", "forces"):

            def predict(batch=batch, kind=kind) -> None:
                painted(batch.to_dict(), compute_force=kind == "forces", training=False)

            seconds[f"screen_{kind}_{name}"] = step_seconds(predict, repeats)
    hand_over(seconds)


if __name__ == "__main__":
    main()
