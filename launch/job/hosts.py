"""Hostfiles of the deepspeed launcher: reading them, and checking that their hosts respond."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_text

SECONDS = 10
"""Seconds within which a host must respond."""
AT_ONCE = 64
"""Number of hosts that are checked at the same time."""
HOST = r"(?:\w[\w.-]*@)?\w[\w.:-]*"
"""A host, perhaps with a user: a name or an address, so that no program takes it for an option or a pattern."""
LINE = re.compile(rf"({HOST})\s+slots=([0-9]{{1,6}})\s*(#.*)?", re.ASCII)


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots of each host of a hostfile, in order; raise ConfigError for a line not like 'HOST slots=N'."""
    lines = read_text(path, "hostfile").splitlines()
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(
                f"hostfile {path}, line {number}: {line.strip()[:80]!r} does not have the form 'HOST slots=N', where "
                "HOST holds letters, digits and . - _ : and begins with a letter or a digit."
            )
        if int(match[2]) == 0:
            raise ConfigError(f"hostfile {path}, line {number}: host {match[1]} has no slots; leave it out.")
        if match[1] in hosts:
            raise ConfigError(f"hostfile {path}, line {number}: host {match[1]} is named twice.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"hostfile {path} names no host.")
    return hosts


def chosen_hosts(path: Path, nodes: int, ranks_per_node: int | None) -> tuple[tuple[str, ...], int]:
    """Return the first `nodes` hosts of a hostfile, and the number of ranks on each.

    Without `ranks_per_node`, it is the number for which all of these hosts have slots. Raise ConfigError if there are
    too few hosts or slots.
    """
    hosts = read_hostfile(path)
    if len(hosts) < nodes:
        names = f"{len(hosts)} host{'s' if len(hosts) > 1 else ''}"
        raise ConfigError(f"--nodes is {nodes}, but hostfile {path} has {names}; add hosts, or use fewer nodes.")
    chosen = dict(list(hosts.items())[:nodes])
    ranks = ranks_per_node or min(chosen.values())
    for host, slots in chosen.items():
        if slots < ranks:
            raise ConfigError(
                f"host {host} has slots={slots} in hostfile {path}, but --ranks-per-node is {ranks}; use no more "
                "than every host has slots for."
            )
    return tuple(chosen), ranks


def check_hosts(hosts: tuple[str, ...]) -> None:
    """Raise ConfigError if a host cannot be reached by ssh without a password, or if ssh or pdsh is missing."""
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise ConfigError(f"ranks on several hosts are started through {program}, which is not installed here.")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(zip(hosts, pool.map(_fault, hosts), strict=True))
    silent = [f"{host} ({answer})" for host, answer in answers.items() if answer]
    if silent:
        raise ConfigError(
            f"not reached by ssh without a password: {', '.join(silent)}; fix that, or remove them from the hostfile."
        )


def _fault(host: str) -> str:
    """Return why a host cannot be reached; empty if it can."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SECONDS}", "--", host, "true"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=2 * SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {2 * SECONDS} s"
    said = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (said[-1].rstrip(".") if said else f"exit status {done.returncode}")
