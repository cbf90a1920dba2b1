"""What a plan is asked for, and whether that divides."""

from __future__ import annotations

from dataclasses import dataclass

from hydrazero.launch.compute import Bench
from hydrazero.launch.site_file import Site
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graph import BatchShape
from hydrazero.trainer.config import RunConfig

FILLED = 0.96
"""Share of a batch's atoms that is used (make bench: packing_fill)."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan is asked for."""

    config: RunConfig
    site: Site
    nodes: int
    ranks_per_node: int
    global_batch: int
    """Structures in a step; 0: what the run file's accumulation gives."""
    hours: float
    """Of a job; 0: the site's most for so many nodes."""
    bench: Bench

    @property
    def ranks(self) -> int:
        """Of the job."""
        return self.nodes * self.ranks_per_node


def check_ranks(asked: Asked) -> None:
    """Raise ConfigError if a node has fewer dies than it is to have ranks."""
    dies = asked.site.nodes.dies
    if asked.ranks_per_node > dies:
        raise ConfigError(
            f"--ranks-per-node is {asked.ranks_per_node}, but a node of site {asked.site.name} has {dies} dies, one "
            "for each rank; ask for no more, and for more --nodes."
        )


def structures_of(shape: BatchShape, atoms: float) -> int:
    """Structures in a batch, by whichever budget is used up first, whole."""
    return max(min(shape.structures, int(FILLED * shape.atoms / atoms)), 1)


def accumulation(asked: Asked, per_batch: int, own: int) -> int:
    """Return the batches of a rank in a step; raises ConfigError, with what divides, if the global batch does not."""
    wanted, at_once = asked.global_batch, asked.ranks * per_batch
    if not wanted:
        return own
    if wanted % at_once:
        near = sorted({max(wanted // at_once, 1), wanted // at_once + 1})
        ways = " or ".join(f"{count * at_once:,} ({count} batches of each rank)" for count in near)
        raise ConfigError(
            f"--global-batch {wanted:,} is no multiple of {asked.ranks:,} ranks times {per_batch} structures; nearest "
            f"{'is' if len(near) == 1 else 'are'} {ways}."
        )
    return wanted // at_once
