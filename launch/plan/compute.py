"""The duration of a training step's computation: a roofline of the device, and the measured fraction of it.

The roofline (Williams, Waterman, Patterson 2009) is the larger of two times: the operations of a step's matrix products
divided by the device's peak, and the bytes that the step writes and reads divided by the memory bandwidth. Real steps
reach a fraction of it, which `make bench` measures on the machine where it runs; the same fraction is used for every
site and is an estimate where the device is another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel

from hydrazero.launch.job.site_file import DeviceSection, load_site
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_json
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.trainer.config.precision import Precision
from hydrazero.trainer.config.sections import ModelSection
from hydrazero.trainer.cost.step_cost import StepCost, step_cost

WRITTEN_AND_READ = 2
"""Minimum number of times that the data which autograd keeps passes through memory."""
BENCH_DEVICES = 2
"""Number of devices of the site 'local' on which `make bench` computes: two threads."""
BENCH_SLOTS = {"cu": 48, "benzene": 16}
"""Number of neighbour slots per atom in the two systems of `make bench`."""
PIPELINES = {"pipeline_molecules_per_s": 20, "pipeline_metals_per_s": 32}
"""Rows with the rate at which a process makes batches, and the atoms per structure in them; the slower is used."""
NEEDED = (*(f"{kind}_train_{system}_atoms" for kind in ("compiled", "eager") for system in BENCH_SLOTS), *PIPELINES)
"""Rows of `make bench` that a plan needs."""
PEAKS = {"fp64": "float64", "tf32": "tf32", "torch_autocast": "bf16", "bf16": "bf16", "fp16": "fp16"}
"""Precision -> key of a site's `die.flops`; float32 for the precision without a key."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The speed at which a device computes."""

    peak: float
    """Peak of matrix products in the run's precision, in FLOP/s."""
    bandwidth: float
    """Memory bandwidth in bytes/s."""
    share: float
    """Fraction of the roofline that steps reach."""
    atoms_of_worker: float | None
    """Atoms/s that a data-loading process reads, builds neighbour lists for and packs; None if it is not known."""
    source: str
    """Where `share` and `atoms_of_worker` come from."""

    def seconds(self, cost: StepCost, shape: BatchShape) -> float:
        """Return the seconds of a forward and backward pass of a full batch."""
        return max(self.parts(cost, shape)) / self.share

    def parts(self, cost: StepCost, shape: BatchShape) -> tuple[float, float]:
        """Return the seconds that arithmetic and memory traffic would take at their peaks."""
        flops = cost.flops_per_atom * shape.atoms + cost.flops_per_slot * shape.slots
        moved = WRITTEN_AND_READ * (cost.bytes_per_atom * shape.atoms + cost.bytes_per_slot * shape.slots)
        return flops / self.peak, moved / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The rates of steps and of data loading that `make bench` has measured."""

    rates: dict[str, float]
    """Value of each row; empty if there are no measurements."""
    source: str
    """The file, or the reason why there are no rates."""


def named_bench(path: Path) -> Bench:
    """Read the rows that a plan needs; raise ConfigError if one is missing."""
    rates, missing = _rates(path)
    if missing:
        raise ConfigError(f"--bench {path} has no row {missing[0]}; create it with `make bench`.")
    return Bench(rates=rates, source=str(path))


def default_bench(path: Path) -> Bench:
    """Read the rows if the file exists and has all of them (`make bench-scaling` alone writes other rows)."""
    if not path.is_file():
        return Bench(rates={}, source=f"no {path}")
    rates, missing = _rates(path)
    if missing:
        return Bench(rates={}, source=f"{path} has no row {missing[0]}")
    return Bench(rates=rates, source=str(path))


def pace_of(device: DeviceSection, precision: Precision, bench: Bench, *, compiled: bool) -> Pace:
    """Return the speed of a device; raise ConfigError if the site does not give its peak for this precision."""
    key = PEAKS.get(precision.key, "float32")
    if key not in device.flops:
        known = ", ".join(sorted(device.flops))
        raise ConfigError(f"the site file has no die.flops.{key}, which {precision.label} needs; it has {known}.")
    peak, bandwidth = device.flops[key].value, device.memory_bandwidth.value
    if not bench.rates:
        source = f"{bench.source}: the full roofline, which no step reaches"
        return Pace(peak=peak, bandwidth=bandwidth, share=1.0, atoms_of_worker=None, source=source)
    kind = "compiled" if compiled else "eager"
    return Pace(
        peak=peak,
        bandwidth=bandwidth,
        share=_share({system: bench.rates[f"{kind}_train_{system}_atoms"] for system in BENCH_SLOTS}),
        atoms_of_worker=min(bench.rates[name] * atoms for name, atoms in PIPELINES.items()),
        source=f"{bench.source}: PaiNN of 128 features, {kind}, on {BENCH_DEVICES} cores",
    )


def _share(rates: dict[str, float]) -> float:
    """Return the fraction of the roofline that training steps reach, averaged over the bench's systems.

    `rates` gives the atoms/s of each system.
    """
    device = load_site("local").die
    model = ModelSection(features=128, layers=3, radial_functions=20, cutoff=5.0, head_features=64)
    cost = step_cost(model.settings(), 1)
    roofline = Pace(
        peak=BENCH_DEVICES * device.flops["float32"].value,
        bandwidth=BENCH_DEVICES * device.memory_bandwidth.value,
        share=1.0,
        atoms_of_worker=None,
        source="",
    )
    return fmean(
        roofline.seconds(cost, BatchShape(structures=1, atoms=1000, slots=1000 * slots)) * rates[system] / 1000
        for system, slots in BENCH_SLOTS.items()
    )


class BenchRow(BaseModel):
    """A row that `make bench` writes."""

    name: str
    value: float


def _rates(path: Path) -> tuple[dict[str, float], list[str]]:
    """Return the rows that a plan needs and the names of missing ones; raise ConfigError if the file is damaged."""
    rows = read_json(path, "--bench", shape=list[BenchRow], hint="create it with `make bench`")
    values = {row["name"]: float(row["value"]) for row in rows}
    rates = {name: values[name] for name in NEEDED if name in values}
    for name, value in rates.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"--bench {path}: {name} is {value:g}; create it again with `make bench`.")
    return rates, [name for name in NEEDED if name not in values]
