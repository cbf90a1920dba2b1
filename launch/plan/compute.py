"""How long a die computes for a training step: a roofline of its peak and its memory, and the measured share of it.

The roofline (Williams, Waterman, Patterson 2009) takes the operations of a step's matrix products over the die's peak,
or what it writes and reads over the bandwidth of its memory, whichever takes longer. Real steps reach a share of that,
which `make bench` has measured where it ran; that share is taken for every site: an estimate where the die is another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from hydrazero.launch.job.site_file import DieSection, load_site
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_json
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.trainer.config.precision import Precision
from hydrazero.trainer.config.sections import ModelSection
from hydrazero.trainer.cost.step_cost import StepCost, step_cost

WRITTEN_AND_READ = 2
"""Times that what autograd keeps goes through memory at least."""
BENCH_DIES = 2
"""Dies of the site 'local' that `make bench` computes on: two threads."""
BENCH_SLOTS = {"cu": 48, "benzene": 16}
"""Neighbour slots of an atom in its two systems."""
PIPELINES = {"pipeline_molecules_per_s": 20, "pipeline_metals_per_s": 32}
"""Rows of how fast a process makes batches, and the atoms of a structure in them; the slower is taken."""
NEEDED = (*(f"{kind}_train_{system}_atoms" for kind in ("compiled", "eager") for system in BENCH_SLOTS), *PIPELINES)
"""Rows of `make bench` that a plan needs."""
PEAKS = {"fp64": "float64", "tf32": "tf32", "torch_autocast": "bf16", "bf16": "bf16", "fp16": "fp16"}
"""Precision -> key of a site's `die.flops`; float32 for the one without a name."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a die computes."""

    peak: float
    """FLOP/s of matrix products in the run's precision."""
    bandwidth: float
    """Bytes/s of its memory."""
    share: float
    """Of the roofline that steps reach."""
    atoms_of_worker: float | None
    """Atoms/s that a process reads, finds the neighbours of and packs; None where that is not known."""
    source: str
    """Where share and atoms are from."""

    def seconds(self, cost: StepCost, shape: BatchShape) -> float:
        """Seconds of a forward and backward of a full batch."""
        return max(self.parts(cost, shape)) / self.share

    def parts(self, cost: StepCost, shape: BatchShape) -> tuple[float, float]:
        """Seconds that arithmetic and memory would take at their peaks."""
        flops = cost.flops_per_atom * shape.atoms + cost.flops_per_slot * shape.slots
        moved = WRITTEN_AND_READ * (cost.bytes_per_atom * shape.atoms + cost.bytes_per_slot * shape.slots)
        return flops / self.peak, moved / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How fast steps and the stream were where `make bench` ran."""

    rates: dict[str, float]
    """Value of each row; none where it has not run."""
    source: str
    """The file, or why there are no rates."""


def named_bench(path: Path) -> Bench:
    """Read the rows that a plan needs; raises ConfigError if they are not all there."""
    rates, missing = _rates(path)
    if missing:
        raise ConfigError(f"--bench {path} has no row {missing[0]}; make it with `make bench`.")
    return Bench(rates=rates, source=str(path))


def default_bench(path: Path) -> Bench:
    """Read the rows if the file is there and has them all (`make bench-scaling` alone writes others)."""
    if not path.is_file():
        return Bench(rates={}, source=f"no {path}")
    rates, missing = _rates(path)
    if missing:
        return Bench(rates={}, source=f"{path} has no row {missing[0]}")
    return Bench(rates=rates, source=str(path))


def pace_of(die: DieSection, precision: Precision, bench: Bench, *, compiled: bool) -> Pace:
    """Return the pace of a die; raises ConfigError if the site does not know its peak."""
    key = PEAKS.get(precision.key, "float32")
    if key not in die.flops:
        known = ", ".join(sorted(die.flops))
        raise ConfigError(f"the site file has no die.flops.{key}, which {precision.label} needs; it has {known}.")
    peak, bandwidth = die.flops[key].value, die.memory_bandwidth.value
    if not bench.rates:
        source = f"{bench.source}: the bare roofline, which no step reaches"
        return Pace(peak=peak, bandwidth=bandwidth, share=1.0, atoms_of_worker=None, source=source)
    kind = "compiled" if compiled else "eager"
    return Pace(
        peak=peak,
        bandwidth=bandwidth,
        share=_share({system: bench.rates[f"{kind}_train_{system}_atoms"] for system in BENCH_SLOTS}),
        atoms_of_worker=min(bench.rates[name] * atoms for name, atoms in PIPELINES.items()),
        source=f"{bench.source}: PaiNN of 128 features, {kind}, on {BENCH_DIES} cores",
    )


def _share(rates: dict[str, float]) -> float:
    """Share of the roofline that training steps reach, mean of the bench's systems, given their atoms/s."""
    die = load_site("local").die
    model = ModelSection(features=128, layers=3, radial_functions=20, cutoff=5.0, head_features=64)
    cost = step_cost(model.settings(), 1)
    whole = Pace(
        peak=BENCH_DIES * die.flops["float32"].value,
        bandwidth=BENCH_DIES * die.memory_bandwidth.value,
        share=1.0,
        atoms_of_worker=None,
        source="",
    )
    return fmean(
        whole.seconds(cost, BatchShape(structures=1, atoms=1000, slots=1000 * slots)) * rates[system] / 1000
        for system, slots in BENCH_SLOTS.items()
    )


def _rates(path: Path) -> tuple[dict[str, float], list[str]]:
    """Value of each row that a plan needs, and names of those that are missing; raises ConfigError if it is damaged."""
    rows = read_json(path, "--bench", hint="make it with `make bench`")
    try:
        values = {row["name"]: float(row["value"]) for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--bench {path} is no list of rows as `make bench` writes them.") from error
    rates = {name: values[name] for name in NEEDED if name in values}
    for name, value in rates.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"--bench {path}: {name} is {value:g}; make it anew with `make bench`.")
    return rates, [name for name in NEEDED if name not in values]
