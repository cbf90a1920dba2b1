"""Site files: what a machine is made of, and how jobs run there."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path

from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.settings_parser import parse_settings

SCHEDULERS = ("none", "slurm", "pbs")
DIES = ("cpu", "gpu")
PRECISIONS = ("float64", "float32", "tf32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number and where it is from."""

    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class DieSection:
    """What one rank has: a GPU, a die of one, or the cores of a rank."""

    kind: str
    """'cpu' or 'gpu'."""
    memory: Measure
    """Bytes."""
    memory_bandwidth: Measure
    """Bytes/s."""
    flops: dict[str, Measure]
    """Precision (of PRECISIONS) -> peak of matrix products, FLOP/s."""


@dataclass(frozen=True, kw_only=True)
class LinkSection:
    """Links over which ranks reach each other."""

    bandwidth: Measure
    """Bytes/s of one die in each direction."""


@dataclass(frozen=True, kw_only=True)
class WaySection:
    """A way in which a library does collectives: their time is start + steps + bytes / bandwidth (alpha-beta model)."""

    algorithm: str
    """'ring', 'tree', 'hierarchical_ring', 'hierarchical_rabenseifner': see launch/plan/collectives.py."""
    protocol: str = ""
    """By the library's name, if it has several."""
    start: float
    """s before the first step."""
    node_step: float
    """s of a step between dies of a node."""
    network_step: float
    """s of a step between nodes."""
    bandwidth_share: float
    """Of the links' bandwidth that it reaches."""
    source: str

    @property
    def name(self) -> str:
        """Algorithm and protocol."""
        return ", ".join(filter(None, (self.algorithm.replace("_", " "), self.protocol)))


@dataclass(frozen=True, kw_only=True)
class CollectivesSection:
    """The library that sums and gathers between ranks."""

    library: str
    """'RCCL', 'NCCL', 'oneCCL', 'gloo'."""
    ways: tuple[WaySection, ...]
    """From which the fastest is taken for each message."""


@dataclass(frozen=True, kw_only=True)
class FilesSection:
    """The file system that shards are read from."""

    bandwidth: Measure
    """Bytes/s of the whole machine."""
    opens: Measure
    """Files opened per second, of the whole machine."""
    node_local: str = ""
    """Folder on each node's own disk, if there is one: shards are copied there."""
    node_local_write: Measure | None = None
    """Bytes/s that a node writes to it."""


@dataclass(frozen=True, kw_only=True)
class NodesSection:
    """The nodes and what a job may ask for."""

    dies: int
    cores: int
    memory: Measure
    """Bytes of main memory."""
    most: int
    """Nodes of the largest job."""
    hours: float
    """Of the longest job."""


@dataclass(frozen=True, kw_only=True)
class VariableSection:
    """An environment variable of every rank."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LimitSection:
    """What the queue of a site gives to jobs of some size."""

    nodes: int
    """Jobs of up to so many nodes ..."""
    hours: float
    """... run at most so long."""
    queue: str = ""
    """In this queue; in the site's own if it is empty."""


@dataclass(frozen=True, kw_only=True)
class JobSection:
    """How a job is written.

    Texts have places: {nodes}, {dies} (ranks of a node), {gpus} (dies that are GPUs), {ranks}, {cores} (of a node),
    {hours}, {walltime} (H:MM:SS), {name}, {account}, {queue}, {output} (file for what the job prints), {stop_before}
    (seconds), {node_local}, {python}, {bin} (its folder), {hosts} (options for the hosts of a hostfile). A text with a
    place for which there is nothing is left out. `$NAME` and `${NAME}` are the shell's. Values come quoted for who
    reads them: the scheduler its directives, the shell commands, and folders and variables, which get double quotes.
    """

    directives: tuple[str, ...] = ()
    """For the scheduler."""
    queue: str = ""
    """Used unless --queue names another one."""
    account_needed: bool = False
    """Whether the scheduler refuses jobs without an account."""
    oldest: str = ""
    """Oldest version of the scheduler that knows what is asked of it here."""
    setup: tuple[str, ...] = ()
    """Commands before anything else: modules, libraries."""
    launcher: str = ""
    """Command that starts the ranks; arguments of hydrazero.launch.node.rank follow."""
    one_device: bool = False
    """Whether the launcher shows each rank its own GPU alone."""
    node_folders: tuple[str, ...] = ()
    """Folders that every node makes on its own disk before the ranks start, and removes at the end."""
    health: str = ""
    """Command that each node must pass before it takes part, beside the check of its GPUs and its disk."""
    check_within: float = 600.0
    """Seconds within which each node must have passed these checks."""
    copy_within: float = 3600.0
    """Seconds within which each node must have copied the shards."""
    stop_before: float = 300.0
    """Seconds before its end at which a job asks its ranks to stop with a checkpoint."""
    requeue: str = ""
    """Command by which a job goes back into the queue; without one it ends."""
    retries: int = 3
    """Times that a job goes back after a failure without a new checkpoint since the one before."""
    limits: tuple[LimitSection, ...] = ()
    """Hours by size, where they depend on it."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A machine."""

    name: str
    about: str
    scheduler: str
    """'none', 'slurm' or 'pbs'."""
    die: DieSection
    nodes: NodesSection
    node_link: LinkSection
    """Between dies of a node."""
    network: LinkSection
    """Between nodes."""
    collectives: CollectivesSection
    files: FilesSection
    job: JobSection = field(default_factory=JobSection)
    variables: tuple[VariableSection, ...] = ()


def site_names() -> list[str]:
    """Names of the sites that come with the package."""
    folder = resources.files("hydrazero.launch") / "sites"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_site(name: str) -> Site:
    """Read a site by its name, or from a file of the user's own; raises ConfigError, naming the key at fault."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"site file {path} does not exist.")
        text, where = path.read_text(encoding="utf-8"), f"{path}:"
    else:
        known = site_names()
        if name not in known:
            raise ConfigError(f"--site '{name}' is not known{did_you_mean(name, known)}.")
        file = resources.files("hydrazero.launch") / "sites" / f"{name}.toml"
        text, where = file.read_text(encoding="utf-8"), f"site {name}:"
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} not valid TOML: {error}.") from error
    site = parse_settings(Site, table, where)
    _check_words(site, where)
    _check_numbers(site, where)
    return site


def _check_words(site: Site, where: str) -> None:
    for key, value, known in (("scheduler", site.scheduler, SCHEDULERS), ("die.kind", site.die.kind, DIES)):
        if value not in known:
            raise ConfigError(f"{where} {key} '{value}' is not known{did_you_mean(value, list(known))}.")
    for precision in site.die.flops:
        if precision not in PRECISIONS:
            hint = did_you_mean(precision, list(PRECISIONS))
            raise ConfigError(f"{where} die.flops.{precision} is not known{hint}.")
    for n, variable in enumerate(site.variables):
        if not re.fullmatch(r"[A-Za-z_]\w*", variable.name, re.ASCII):
            raise ConfigError(f"{where} variables[{n}].name '{variable.name}' is no name of an environment variable.")
    if not re.fullmatch(r"(\d+(\.\d+)*)?", site.job.oldest):
        raise ConfigError(f"{where} job.oldest must be a version such as '20.11', not '{site.job.oldest}'.")
    if not site.job.launcher:
        raise ConfigError(f"{where} job.launcher is missing: the command that starts the ranks.")


def _check_numbers(site: Site, where: str) -> None:
    """Raise ConfigError for a number that no machine can have; all but steps of collectives and retries are above 0."""
    for key, value in _numbers(site):
        may_be_zero = key.endswith((".start", ".node_step", ".network_step", ".retries"))
        if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
            raise ConfigError(f"{where} {key} must be {'0 or more' if may_be_zero else 'above 0'}, not {value:g}.")


def _numbers(section: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Walk through all numbers of a section and those within; a measure has the name of its key."""
    if isinstance(section, bool):
        return
    if isinstance(section, int | float):
        yield path, section
    elif isinstance(section, Measure):
        yield path, section.value
    elif is_dataclass(section):
        for item in fields(section):
            yield from _numbers(getattr(section, item.name), f"{path}.{item.name}".lstrip("."))
    elif isinstance(section, dict):
        for name, each in section.items():
            yield from _numbers(each, f"{path}.{name}")
    elif isinstance(section, tuple):
        for n, each in enumerate(section):
            yield from _numbers(each, f"{path}[{n}]")
