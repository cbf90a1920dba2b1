"""The texts of a site file for one job: placeholders are replaced, quoted for the program that reads the text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from hydrazero.launch.job.job import Job
from hydrazero.launch.job.schedulers import SCHEDULERS
from hydrazero.launch.job.site_file import VariableSection
from hydrazero.shards.errors import ConfigError, did_you_mean

PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")
"""A placeholder of a site file; with a dollar in front, it is a variable of the shell."""
MAY_BE_EMPTY = ("hosts",)
"""Placeholders that may be replaced by nothing."""
FOR_THE_SHELL = ("node_local", "python", "bin", "hosts")
"""Placeholders whose values are already quoted for the shell."""


def placeholder_values(job: Job) -> dict[str, str]:
    """Return the value of each placeholder; raise ConfigError if schedulers do not accept the run folder's name."""
    minutes = round(60 * job.hours)
    hosts = ""
    if job.hosts and job.hostfile is not None:
        file = shlex.quote(str(job.hostfile.absolute()))
        hosts = f'--hostfile={file} --num_nodes={job.nodes} --master_addr="$MASTER_ADDR" --no_ssh_check --force_multi'
    output = str(job.launch_dir / "job")
    if re.search(r"[\\\x00-\x1f\x7f]", output):
        raise ConfigError(
            f"run.out: schedulers accept no backslash or line break in {str(job.run_dir)!r}; rename the folder."
        )
    return {
        "nodes": str(job.nodes),
        "dies": str(job.ranks_per_node),
        "gpus": str(job.gpus_per_node or ""),
        "ranks": str(job.ranks),
        "cores": str(job.site.nodes.cores),
        "hours": f"{job.hours:g}" if job.hours else "",
        "walltime": f"{minutes // 60}:{minutes % 60:02d}:00" if job.hours else "",
        # The characters that PBS accepts; Slurm accepts more.
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
    """The texts of a job's site; all methods raise ConfigError for an unknown placeholder."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.values = placeholder_values(job)

    def directives(self) -> list[str]:
        """Return the directives for the scheduler, without those that have a placeholder without a value."""
        return self._all("directives", SCHEDULERS[self.job.site.scheduler].quoted)

    def setup(self) -> list[str]:
        """Return the shell commands that come first in the job."""
        return self._all("setup", shlex.quote)

    def node_folders(self) -> list[str]:
        """Return the folders that nodes create, quoted for the shell."""
        return [f'"{folder}"' for folder in self._all("node_folders", within_quotes)]

    def variable(self, variable: VariableSection) -> str | None:
        """Return the value of a variable, quoted for the shell; None if one of its placeholders has no value."""
        value = self._filled(variable.value, f"variable {variable.name}", within_quotes)
        return None if value is None else f'"{value}"'

    def command(self, key: str) -> str:
        """Return a shell command; empty if the site has none. Raise ConfigError if a placeholder has no value."""
        command = self._filled(getattr(self.job.site.job, key), f"job.{key}", shlex.quote)
        if command is None:
            raise ConfigError(
                f"site {self.job.site.name}: job.{key} has a placeholder for which this job has no value."
            )
        return command

    def _all(self, key: str, quoted: Callable[[str], str]) -> list[str]:
        texts = getattr(self.job.site.job, key)
        lines = (self._filled(text, f"job.{key}[{n}]", quoted) for n, text in enumerate(texts))
        return [line for line in lines if line is not None]

    def _filled(self, text: str, key: str, quoted: Callable[[str], str]) -> str | None:
        """Return a text with its placeholders replaced; None if one of them has no value."""
        names, where = PLACEHOLDER.findall(text), f"site {self.job.site.name}: {key}"
        for name in names:
            if name not in self.values:
                hint = did_you_mean(name, list(self.values))
                raise ConfigError(f"{where} has the placeholder {{{name}}}, which is not known{hint}.")
        if any(not self.values[name] and name not in MAY_BE_EMPTY for name in names):
            return None
        return PLACEHOLDER.sub(lambda match: self._value(match[1], quoted), text)

    def _value(self, name: str, quoted: Callable[[str], str]) -> str:
        value = self.values[name]
        return value if name in FOR_THE_SHELL else quoted(value)


def within_quotes(text: str) -> str:
    """Return a text escaped for use between double quotes of the shell."""
    return re.sub(r'([\\"$`])', r"\\\1", text)
