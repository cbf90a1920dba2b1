"""Site files: the hardware of a machine, and how jobs run there."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.files import read_toml
from hydrazero.shards.settings_parser import ListOf, Section, parse_settings
from hydrazero.shards.text.names import OneLine

Precision = Literal["float64", "float32", "tf32", "bf16", "fp16"]


class Measure(Section):
    """A number and its source."""

    value: PositiveFloat
    """The number, in the unit that the key asks for."""
    source: str
    """Where the number comes from: a data sheet, a measurement, an estimate."""


class DeviceSection(Section):
    """The device of one rank: a GPU, a part of a GPU that appears as several devices, or some of a node's CPU cores."""

    kind: Literal["cpu", "gpu"]
    """Kind of device: 'cpu' or 'gpu'."""
    memory: Measure
    """Memory in bytes."""
    memory_bandwidth: Measure
    """Memory bandwidth in bytes/s."""
    flops: dict[Precision, Measure]
    """Peak of matrix products in FLOP/s, by precision: 'float64', 'float32', 'tf32', 'bf16', 'fp16'."""


class LinkSection(Section):
    """The links over which ranks reach each other."""

    bandwidth: Measure
    """Bandwidth of one device in each direction, in bytes/s."""


class AlgorithmSection(Section):
    """An algorithm for collective operations; its time is start + steps + bytes / bandwidth (the alpha-beta model)."""

    algorithm: str
    """Algorithm: 'ring', 'tree', 'hierarchical_ring' or 'hierarchical_rabenseifner'."""
    protocol: str = ""
    """Name that the library gives the protocol, if it has several."""
    start: NonNegativeFloat
    """Seconds before the first step."""
    node_step: NonNegativeFloat
    """Seconds of a step between devices of a node."""
    network_step: NonNegativeFloat
    """Seconds of a step between nodes."""
    bandwidth_share: PositiveFloat
    """Fraction of the links' bandwidth that the algorithm reaches."""
    source: str
    """Where the numbers come from."""

    @property
    def name(self) -> str:
        """The algorithm and the protocol, for tables."""
        return ", ".join(filter(None, (self.algorithm.replace("_", " "), self.protocol)))


class CollectivesSection(Section):
    """The library that does the collective operations."""

    library: str
    """Name of the library: 'RCCL', 'NCCL', 'oneCCL' or 'gloo'."""
    ways: ListOf[AlgorithmSection]
    """Algorithms of the library; the fastest one is taken for each message."""


class FilesSection(Section):
    """The file system from which shards are read."""

    bandwidth: Measure
    """Bandwidth for the whole machine, in bytes/s."""
    opens: Measure
    """Number of files that the whole machine can open per second."""
    node_local: str = ""
    """Folder on the local disk of each node, if there is one, to which shards are copied. It may hold variables of the
    shell, but no spaces, quotes or commands."""
    node_local_write: Measure | None = None
    """Bandwidth at which a node writes to its local disk, in bytes/s."""

    @field_validator("node_local")
    @classmethod
    def _check_node_local(cls, folder: str) -> str:
        if not re.fullmatch(r"([/$][\w/.,+=@%:${}-]*)?", folder, re.ASCII):
            raise ValueError(
                f"{folder!r} is no folder of a node; it begins with '/' or a variable such as $TMPDIR and holds "
                "letters, digits, variables and . , + = @ % : - only."
            )
        return folder


class NodesSection(Section):
    """The nodes of the machine and the limits of its jobs."""

    dies: PositiveInt
    """Number of devices of a node, each of which runs one rank."""
    cores: PositiveInt
    """Number of CPU cores of a node."""
    memory: Measure
    """Main memory of a node in bytes."""
    most: PositiveInt
    """Number of nodes of the largest job."""
    hours: PositiveFloat
    """Time limit of the longest job in hours."""


class VariableSection(Section):
    """An environment variable of every rank."""

    name: str
    """Name of the variable."""
    value: OneLine
    """Value of the variable."""
    reason: str
    """Why the variable is set, which is written into the job as a comment."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"'{name}' is no name of an environment variable.")
        return name


class LimitSection(Section):
    """The time limit of jobs up to some size, and the queue that they use."""

    nodes: PositiveInt
    """Largest number of nodes of these jobs."""
    hours: PositiveFloat
    """Time limit of these jobs in hours."""
    queue: OneLine = ""
    """Queue of these jobs; the queue of the site if it is empty."""


class JobSection(Section):
    """The commands and options of a job.

    Texts may hold these placeholders: {nodes}, {dies} (ranks of a node), {gpus} (devices that are GPUs), {ranks},
    {cores} (of a node), {hours}, {walltime} (H:MM:SS), {name}, {account}, {queue}, {output} (file for the output of the
    job), {stop_before} (seconds), {node_local}, {python}, {bin} (the folder of python) and {hosts} (options for the
    hosts of a hostfile). A text is left out if there is no value for one of its placeholders. `$NAME` and `${NAME}` are
    left to the shell. Values are quoted for the program that reads them: the scheduler reads directives, the shell
    reads commands, and folders and variables are put into double quotes.
    """

    directives: ListOf[OneLine] = ()
    """Directives for the scheduler."""
    queue: OneLine = ""
    """Queue, unless --queue names another one."""
    account_needed: bool = False
    """Whether the scheduler rejects jobs without an account."""
    oldest: str = ""
    """Oldest version of the scheduler that supports these directives, such as '20.11'."""
    setup: ListOf[OneLine] = ()
    """Commands that come before everything else, such as loading modules."""
    launcher: Annotated[OneLine, Field(min_length=1)]
    """Command that starts the ranks; the arguments of hydrazero.launch.node.rank follow."""
    one_device: bool = False
    """Whether the launcher shows each rank only its own GPU."""
    node_folders: ListOf[OneLine] = ()
    """Folders that every node creates on its local disk before the ranks start, and removes at the end."""
    health: OneLine = ""
    """Command that must succeed on each node before the node takes part, besides the checks of its GPUs and its
    disk."""
    check_within: PositiveFloat = 600.0
    """Seconds within which each node must have passed these checks."""
    copy_within: PositiveFloat = 3600.0
    """Seconds within which each node must have copied the shards."""
    stop_before: PositiveFloat = 300.0
    """Seconds before its end at which a job asks its ranks to write a checkpoint and stop."""
    requeue: OneLine = ""
    """Command that puts a job back into the queue; without one, the job ends."""
    retries: NonNegativeInt = 3
    """Number of times that a job is put back into the queue after a failure without a new checkpoint since the last
    one."""
    limits: ListOf[LimitSection] = ()
    """Time limits by number of nodes, where they depend on it."""

    @field_validator("launcher")
    @classmethod
    def _follow_moved_module(cls, launcher: str) -> str:
        """Replace the former name of hydrazero.launch.node.rank, which older site files contain."""
        return re.sub(r"\bhydrazero\.launch\.rank\b", "hydrazero.launch.node.rank", launcher)

    @field_validator("oldest")
    @classmethod
    def _check_oldest(cls, oldest: str) -> str:
        if not re.fullmatch(r"(\d+(\.\d+)*)?", oldest):
            raise ValueError(f"'{oldest}' is no version; give one such as '20.11'.")
        return oldest


class Site(Section):
    """A complete site file: one machine."""

    name: OneLine
    """Name of the site."""
    about: OneLine
    """One sentence about the machine."""
    scheduler: Literal["none", "slurm", "pbs"]
    """Scheduler of the machine: 'none', 'slurm' or 'pbs'."""
    die: DeviceSection
    nodes: NodesSection
    node_link: LinkSection
    """Links between the devices of a node."""
    network: LinkSection
    """Links between nodes."""
    collectives: CollectivesSection
    files: FilesSection
    job: JobSection
    variables: ListOf[VariableSection] = ()
    """Environment variables of every rank."""


def site_names() -> list[str]:
    """Return the names of the sites that come with the package."""
    folder = resources.files("hydrazero.launch") / "sites"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_site(name: str) -> Site:
    """Read a site by its name, or from a file of the user; raises ConfigError that names the key at fault."""
    if name.endswith(".toml"):
        table, where = read_toml(Path(name), "site file"), f"{name}:"
    else:
        known = site_names()
        if name not in known:
            raise ConfigError(f"--site '{name}' is not known{did_you_mean(name, known)}.")
        table = read_toml(resources.files("hydrazero.launch") / "sites" / f"{name}.toml", "site file")
        where = f"site {name}:"
    return parse_settings(Site, table, where)
