"""A job as it is asked for, and whether the site can run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydrazero.launch.job.site_file import Site
from hydrazero.launch.node.records import LAUNCH
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.location import is_remote
from hydrazero.shards.manifest import read_manifest
from hydrazero.trainer.config.run_file import RunConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run, where, and how long."""

    site: Site
    run_file: Path
    config: RunConfig
    overrides: tuple[str, ...]
    """'section.key=value' of the run file."""
    resume: bool
    nodes: int
    ranks_per_node: int
    hours: float
    """0: no limit, where there is no scheduler."""
    account: str
    queue: str
    hostfile: Path | None
    hosts: tuple[str, ...]
    """Of the hostfile; none: this host."""
    stage: bool
    """Whether shards are copied to the nodes' own disks."""
    command: str
    """As the user gave it."""

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.out).absolute()

    @property
    def launch_dir(self) -> Path:
        """Where script, outputs and tries lie."""
        return self.run_dir / LAUNCH

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * self.ranks_per_node

    @property
    def gpus_per_node(self) -> int:
        """GPUs that a node must have; 0 where ranks compute on cores."""
        return self.ranks_per_node if self.site.die.kind == "gpu" else 0

    def staged(self) -> dict[str, Path]:
        """Folders of shards that are copied to the nodes' own disks, by task; those on the web are not."""
        if not self.stage:
            return {}
        return {t.name: Path(t.shards).absolute() for t in self.config.tasks if not is_remote(t.shards)}

    def staged_bytes(self) -> int:
        """Size of what is copied."""
        manifests = [read_manifest(folder) for folder in self.staged().values()]
        return sum(shard.bytes for m in manifests for shards in m.splits.values() for shard in shards)


def longest_hours(site: Site, nodes: int, queue: str) -> float:
    """Hours that a queue of a site gives to a job of so many nodes."""
    own = queue or site.job.queue
    limits = [limit for limit in site.job.limits if (limit.queue or site.job.queue) == own and nodes <= limit.nodes]
    return min(limits, key=lambda limit: limit.nodes).hours if limits else site.nodes.hours


def check_size(site: Site, nodes: int, hours: float, queue: str) -> None:
    """Raise ConfigError if a site does not give a job so many nodes for so long."""
    if nodes > site.nodes.most:
        raise ConfigError(f"--nodes is {nodes}, but jobs of site {site.name} have at most {site.nodes.most} nodes.")
    longest = longest_hours(site, nodes, queue)
    if hours > longest:
        raise ConfigError(
            f"--hours is {hours:g}, but site {site.name} gives jobs of {nodes} nodes at most {longest:g} hours; "
            "ask for those: when its time is over a job goes back into the queue and on from its checkpoint."
        )
    if hours and 3600 * hours <= 2 * site.job.stop_before:
        raise ConfigError(
            f"--hours is {hours:g}, but a job stops {site.job.stop_before:g} s before its end to save a checkpoint, so "
            "that hardly any time would be left; ask for more."
        )


def check_account(site: Site, account: str) -> None:
    """Raise ConfigError if a site wants an account and there is none."""
    if site.job.account_needed and not account:
        raise ConfigError(f"site {site.name} charges an account for each job; name it with --account.")
