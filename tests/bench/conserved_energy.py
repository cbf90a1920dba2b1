"""Drift of the total energy in dynamics at constant energy with an exported model, in numbers and as a figure.

python tests/bench/conserved_energy.py MODEL.safetensors --out energy.png [--picoseconds 10]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from numpy.typing import NDArray

from hydrazero.models import Potential, load_model
from hydrazero.shards.errors import HydrazeroError

TEMPERATURE = 300.0
"""Temperature at the start, K; half of it becomes potential energy."""
SAMPLES = 1000
"""Number of total energies that are kept from a run."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class System:
    """A system with the task that moves it and its time step."""

    label: str
    atoms: Atoms
    task: str
    step: float
    """Time step, fs."""


@dataclass(frozen=True, kw_only=True)
class Conserved:
    """Total energies over a run, with their drift."""

    times: NDArray[np.float64]
    """Times, ps."""
    energies: NDArray[np.float64]
    """Total energies relative to the first one, meV/atom."""
    drift: float
    """Slope of a straight line fitted to the energies, meV/atom/ps."""
    temperature: float
    """Mean temperature, K."""


def systems(molecule_task: str, crystal_task: str) -> list[System]:
    """Return a molecule of 9 atoms and a crystal of 32 atoms."""
    return [
        System(label="ethanol", atoms=molecule("CH3CH2OH"), task=molecule_task, step=0.5),
        System(label="copper, 32 atoms", atoms=bulk("Cu", cubic=True) * (2, 2, 2), task=crystal_task, step=2.0),
    ]


def run_at_constant_energy(potential: Potential, system: System, picoseconds: float, *, compile: bool) -> Conserved:
    """Relax, heat to TEMPERATURE and integrate with velocity Verlet; return the total energies."""
    atoms = system.atoms.copy()
    atoms.calc = potential.calculator(system.task)
    BFGS(atoms, logfile=None).run(fmax=0.02, steps=200)
    atoms.calc = potential.calculator(system.task, skin=0.5, compile=compile)
    # The atoms start at the minimum of the potential energy, which takes up half of the kinetic energy.
    thermalize_momenta(atoms, temperature_K=2 * TEMPERATURE, rng=np.random.default_rng(SEED))
    Stationary(atoms)
    if not atoms.pbc.any():
        ZeroRotation(atoms)
    steps = round(1000.0 * picoseconds / system.step)
    found: list[tuple[float, float]] = []
    dynamics = VelocityVerlet(atoms, system.step * units.fs)
    dynamics.attach(
        lambda: found.append((atoms.get_total_energy(), atoms.get_temperature())), interval=max(steps // SAMPLES, 1)
    )
    dynamics.run(steps)
    totals, temperatures = np.array(found).T
    times = np.linspace(0.0, picoseconds, len(totals))
    energies = 1000.0 * (totals - totals[0]) / len(atoms)
    drift = float(np.polyfit(times, energies, 1)[0])
    return Conserved(times=times, energies=energies, drift=drift, temperature=float(temperatures.mean()))


def draw(runs: dict[str, Conserved], out: Path) -> None:
    """Write a figure of total energies over time, with the drift in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, run in runs.items():
        text = f"{label}, {run.temperature:.0f} K: {run.drift:+.4f} meV/atom/ps"
        axes.plot(run.times, run.energies, linewidth=0.8, label=text)
    axes.set_xlabel("time / ps")
    axes.set_ylabel("total energy, change / (meV/atom)")
    axes.axhline(0.0, color="0.6", linewidth=0.6, zorder=0)
    axes.margins(x=0.01)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    figure.savefig(out, dpi=150)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="FILE.png", type=click.Path(path_type=Path), help="Picture to write.")
@click.option("--picoseconds", default=10.0, show_default=True, type=click.FloatRange(0.1))
@click.option("--molecule-task", default="gfn2", show_default=True)
@click.option("--crystal-task", default="emt", show_default=True)
@click.option("--compile", is_flag=True, help="Compile the steps.")
def main(model: Path, out: Path, picoseconds: float, molecule_task: str, crystal_task: str, compile: bool) -> None:
    """Measure the drift of the total energy of a molecule and a crystal in dynamics at constant energy."""
    try:
        potential = load_model(model)
        runs = {}
        for system in systems(molecule_task, crystal_task):
            runs[f"{system.label} ({system.task})"] = found = run_at_constant_energy(
                potential, system, picoseconds, compile=compile
            )
            spread = float(found.energies.max() - found.energies.min())
            click.echo(
                f"{system.label}, {system.task}, steps of {system.step:g} fs, {picoseconds:g} ps, "
                f"{found.temperature:.0f} K: drift {found.drift:+.4f} meV/atom/ps, within {spread:.3f} meV/atom"
            )
    except HydrazeroError as error:
        raise click.ClickException(str(error)) from error
    draw(runs, out)
    click.echo(f"{out}")


if __name__ == "__main__":
    main()
