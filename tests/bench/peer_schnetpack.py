"""Time per step of SchNetPack's PaiNN on the same systems; runs in an environment of its own."""

from __future__ import annotations

import sys

import numpy as np
import torch
from ase.neighborlist import neighbor_list
from schnetpack import properties
from schnetpack.atomistic import Atomwise, Forces, PairwiseDistances
from schnetpack.model import NeuralNetworkPotential
from schnetpack.nn import CosineCutoff, GaussianRBF
from schnetpack.representation import PaiNN
from systems import CUTOFF, FEATURES, LAYERS, RADIAL_FUNCTIONS, SCREENED, SYSTEMS, THREADS
from timing import hand_over, peak_megabytes, step_seconds


def inputs_of(structures: list) -> dict[str, torch.Tensor]:
    """Return a batch of structures in SchNetPack's format."""
    columns: dict[str, list] = {name: [] for name in ("z", "r", "i", "j", "offset", "m", "n", "cell", "pbc")}
    first = 0
    for number, atoms in enumerate(structures):
        i, j, shifts = neighbor_list("ijS", atoms, CUTOFF)
        columns["z"].append(atoms.numbers)
        columns["r"].append(atoms.positions)
        columns["i"].append(i + first)
        columns["j"].append(j + first)
        columns["offset"].append(shifts @ atoms.cell[:])
        columns["m"].append(np.full(len(atoms), number))
        columns["n"].append([len(atoms)])
        columns["cell"].append(atoms.cell[:][None])
        columns["pbc"].append(atoms.pbc)
        first += len(atoms)
    joined = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()}
    floats = {name: joined[name].float() for name in ("r", "offset", "cell")}
    return {
        properties.Z: joined["z"].long(),
        properties.R: floats["r"],
        properties.idx_i: joined["i"].long(),
        properties.idx_j: joined["j"].long(),
        properties.offsets: floats["offset"],
        properties.idx_m: joined["m"].long(),
        properties.n_atoms: joined["n"].long(),
        properties.cell: floats["cell"],
        properties.pbc: joined["pbc"],
    }


def potential(*, forces: bool) -> NeuralNetworkPotential:
    """Return PaiNN with one head for energies, and with their gradient if `forces` is true."""
    torch.manual_seed(0)
    painn = PaiNN(
        n_atom_basis=FEATURES,
        n_interactions=LAYERS,
        radial_basis=GaussianRBF(n_rbf=RADIAL_FUNCTIONS, cutoff=CUTOFF),
        cutoff_fn=CosineCutoff(CUTOFF),
    )
    heads = [Atomwise(n_in=FEATURES, output_key="energy")]
    heads += [Forces(energy_key="energy", force_key="forces")] if forces else []
    return NeuralNetworkPotential(
        representation=painn,
        input_modules=[PairwiseDistances()],
        output_modules=heads,
    )


def screen_seconds(repeats: int) -> dict[str, list[float]]:
    """Return the seconds of a batch of screened structures whose neighbours are known."""
    seconds = {}
    for name, make in SCREENED.items():
        inputs = inputs_of(make())
        for kind in ("energy", "forces"):
            model = potential(forces=kind == "forces").eval()

            def predict(model=model, inputs=inputs, kind=kind) -> None:
                with torch.set_grad_enabled(kind == "forces"):
                    model(dict(inputs))

            seconds[f"screen_{kind}_{name}"] = step_seconds(predict, repeats)
    return seconds


def main() -> None:
    repeats = int(sys.argv[1])
    torch.set_num_threads(THREADS)
    if sys.argv[2:] == ["screen"]:
        hand_over(screen_seconds(repeats))
        return
    model = potential(forces=True)
    seconds = {}
    for name, make in SYSTEMS.items():
        inputs = inputs_of(make())

        def train(inputs=inputs) -> None:
            model.zero_grad()
            out = model.train()(dict(inputs))
            (out["energy"].square().mean() + out["forces"].square().mean()).backward()

        def infer(inputs=inputs) -> None:
            model.eval()(dict(inputs))

        seconds[f"train_{name}"] = step_seconds(train, repeats)
        seconds[f"infer_{name}"] = step_seconds(infer, repeats)
        seconds[f"memory_{name}"] = [peak_megabytes(train)]
    hand_over(seconds)


if __name__ == "__main__":
    main()
