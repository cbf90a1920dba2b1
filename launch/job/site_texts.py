"""The texts of a site file for one job: places in them filled in, each as what reads the text wants it quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from hydrazero.launch.job.job import Job
from hydrazero.launch.job.schedulers import SCHEDULERS
from hydrazero.launch.job.site_file import VariableSection
from hydrazero.shards.errors import ConfigError, did_you_mean

PLACE = re.compile(r"(?<!\$)\{(\w+)\}")
"""Of a text in a site file; with a dollar before it, it is the shell's."""
MAY_BE_EMPTY = ("hosts",)
"""Places of which a text may have nothing."""
FOR_THE_SHELL = ("node_local", "python", "bin", "hosts")
"""Places whose values are the shell's words already."""


def places(job: Job) -> dict[str, str]:
    """Return what stands for each place in the texts of a site file; raises ConfigError for a folder's name."""
    minutes = round(60 * job.hours)
    hosts = ""
    if job.hosts and job.hostfile is not None:
        file = shlex.quote(str(job.hostfile.absolute()))
        hosts = f'--hostfile={file} --num_nodes={job.nodes} --master_addr="$MASTER_ADDR" --no_ssh_check --force_multi'
    output = str(job.launch_dir / "job")
    if re.search(r"[\\\x00-\x1f\x7f]", output):
        raise ConfigError(
            f"run.out: schedulers take no backslash or line break in {str(job.run_dir)!r}; name the folder otherwise."
        )
    return {
        "nodes": str(job.nodes),
        "dies": str(job.ranks_per_node),
        "gpus": str(job.gpus_per_node or ""),
        "ranks": str(job.ranks),
        "cores": str(job.site.nodes.cores),
        "hours": f"{job.hours:g}" if job.hours else "",
        "walltime": f"{minutes // 60}:{minutes % 60:02d}:00" if job.hours else "",
        # What PBS takes; Slurm takes more.
        "name": re.sub(r"[^\w.+-]", "_", job.run_dir.name, flags=re.ASCII),
        "account": job.account,
        "queue": job.queue or job.site.job.queue,
        "output": output,
        "stop_before": f"{job.site.job.stop_before:.0f}",
        "node_local": job.site.files.node_local,
        "python": '"$python"',
        "bin": '"$bin"',
        "hosts": hosts,
    }


class SiteTexts:
    """The texts of a job's site; all raise ConfigError for a place that is not known, or a command's that is empty."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.values = places(job)

    def directives(self) -> list[str]:
        """What the scheduler reads, less what has a place for which there is nothing."""
        return self._all("directives", SCHEDULERS[self.job.site.scheduler].quoted)

    def setup(self) -> list[str]:
        """Commands of the shell."""
        return self._all("setup", shlex.quote)

    def node_folders(self) -> list[str]:
        """Words of the shell."""
        return [f'"{folder}"' for folder in self._all("node_folders", within_quotes)]

    def variable(self, variable: VariableSection) -> str | None:
        """Return the value of a variable, a word of the shell; None if there is nothing for one of its places."""
        value = self._filled(variable.value, f"variable {variable.name}", within_quotes)
        return None if value is None else f'"{value}"'

    def command(self, key: str) -> str:
        """Return a command of the shell, empty if the site has none."""
        command = self._filled(getattr(self.job.site.job, key), f"job.{key}", shlex.quote)
        if command is None:
            raise ConfigError(f"site {self.job.site.name}: job.{key} has a place for which this job has nothing.")
        return command

    def _all(self, key: str, quoted: Callable[[str], str]) -> list[str]:
        texts = getattr(self.job.site.job, key)
        lines = (self._filled(text, f"job.{key}[{n}]", quoted) for n, text in enumerate(texts))
        return [line for line in lines if line is not None]

    def _filled(self, text: str, key: str, quoted: Callable[[str], str]) -> str | None:
        """Return a text with its places filled in, None if there is nothing for one."""
        names, where = PLACE.findall(text), f"site {self.job.site.name}: {key}"
        for name in names:
            if name not in self.values:
                hint = did_you_mean(name, list(self.values))
                raise ConfigError(f"{where} has the place {{{name}}}, which is not known{hint}.")
        if any(not self.values[name] and name not in MAY_BE_EMPTY for name in names):
            return None
        return PLACE.sub(lambda place: self._value(place[1], quoted), text)

    def _value(self, name: str, quoted: Callable[[str], str]) -> str:
        value = self.values[name]
        return value if name in FOR_THE_SHELL else quoted(value)


def within_quotes(text: str) -> str:
    """Return a text as it stands between double quotes of the shell."""
    return re.sub(r'([\\"$`])', r"\\\1", text)
