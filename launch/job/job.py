"""A job, and checks that its site can run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydrazero.launch.job.site_file import Site
from hydrazero.launch.node.records import LAUNCH
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.location import is_remote
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.text.names import check_plain
from hydrazero.trainer.config.sections import TaskSection


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run as one job of a site."""

    site: Site
    run_file: Path
    run_dir: Path
    """Run folder."""
    tasks: tuple[TaskSection, ...]
    overrides: tuple[str, ...]
    """Values of the run file that are replaced: 'section.key=value'."""
    resume: bool
    """Whether the run continues from its last checkpoint."""
    nodes: int
    ranks_per_node: int
    hours: float
    """Time limit; 0 for no limit, which is possible without a scheduler."""
    account: str
    queue: str
    hostfile: Path | None
    hosts: tuple[str, ...]
    """Hosts of the hostfile; empty for this host."""
    stage: bool
    """Whether shards are copied to the nodes' own disks."""
    command: str
    """Command line of the user."""

    def __post_init__(self) -> None:
        check_plain(self.account, "--account")
        check_plain(self.queue, "--queue")
        for what, path in (("the path of the run file,", self.run_file), ("--hostfile", self.hostfile)):
            check_plain(str(path), what)

    @property
    def launch_dir(self) -> Path:
        """Folder with the script, the outputs of jobs, and the records of attempts."""
        return self.run_dir / LAUNCH

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def gpus_per_node(self) -> int:
        """Number of GPUs that a node must have; 0 if ranks compute on CPU cores."""
        return self.ranks_per_node if self.site.die.kind == "gpu" else 0

    def staged(self) -> dict[str, Path]:
        """Return the folders of shards that are copied to the nodes' own disks, by task; remote ones are not copied."""
        if not self.stage:
            return {}
        return {t.name: Path(t.shards).absolute() for t in self.tasks if not is_remote(t.location)}

    def staged_bytes(self) -> int:
        """Return the size of the shards that are copied."""
        manifests = [read_manifest(folder) for folder in self.staged().values()]
        return sum(shard.bytes for m in manifests for shards in m.splits.values() for shard in shards)


def longest_hours(site: Site, nodes: int, queue: str) -> float:
    """Return the time limit, in hours, of a job with this number of nodes in a queue of a site."""
    own = queue or site.job.queue
    limits = [limit for limit in site.job.limits if (limit.queue or site.job.queue) == own and nodes <= limit.nodes]
    return min(limits, key=lambda limit: limit.nodes).hours if limits else site.nodes.hours


def check_size(site: Site, nodes: int, hours: float, queue: str) -> None:
    """Raise ConfigError if a site does not allow a job of this size and duration."""
    if nodes > site.nodes.most:
        raise ConfigError(f"--nodes is {nodes}, but jobs of site {site.name} have at most {site.nodes.most} nodes.")
    longest = longest_hours(site, nodes, queue)
    if hours > longest:
        raise ConfigError(
            f"--hours is {hours:g}, but site {site.name} limits jobs with --nodes {nodes} to {longest:g} hours; "
            "request that many: at its time limit, a job is put back into the queue and continues from a checkpoint."
        )
    if hours and 3600 * hours <= 2 * site.job.stop_before:
        raise ConfigError(
            f"--hours is {hours:g}, but a job stops {site.job.stop_before:g} s before its time limit to write a "
            "checkpoint, so hardly any time would be left; request more."
        )


def check_account(site: Site, account: str) -> None:
    """Raise ConfigError if a site needs an account and none is given."""
    if site.job.account_needed and not account:
        raise ConfigError(f"site {site.name} charges each job to an account; name it with --account.")
