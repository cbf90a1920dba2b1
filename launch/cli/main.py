"""The command line: `hydrazero COMMAND`. Commands import slow modules only when they run, so that --help is quick."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from hydrazero.launch.cli.convert import convert_command, subset_command
from hydrazero.launch.cli.demo import demo_command
from hydrazero.launch.cli.doctor import doctor_command
from hydrazero.launch.cli.evaluate import evaluate_command
from hydrazero.launch.cli.export import export_command, package_command
from hydrazero.launch.cli.finetune import finetune_command
from hydrazero.launch.cli.init import init_command
from hydrazero.launch.cli.inspect_command import inspect_command
from hydrazero.launch.cli.launch import launch_command, postmortem_command
from hydrazero.launch.cli.plan import plan_command
from hydrazero.launch.cli.report import report_command
from hydrazero.launch.cli.screen import screen_command
from hydrazero.launch.cli.search import search_command
from hydrazero.launch.cli.train import train_command
from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.files import file_fault
from hydrazero.shards.text.foreign_text import echo, escaped, escaped_lines

SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Data": (convert_command, subset_command, inspect_command),
    "Train": (init_command, train_command, finetune_command, search_command, evaluate_command, report_command),
    "Use": (export_command, package_command, screen_command),
    "Cluster": (launch_command, plan_command, postmortem_command),
    "Help": (demo_command, doctor_command),
}
"""Heading on the help page -> its commands, in the order in which they are shown."""


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Write warnings of this project as 'warning: ...', without the line of its code; those of others as they are."""
    usual = warnings.formatwarning

    def text_of(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        if category.__module__.startswith("hydrazero.") or _is_of_project(filename):
            return f"warning: {escaped_lines(message)}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = text_of
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _is_of_project(filename: str) -> bool:
    """Return whether a file is a module of this project that has been imported."""
    modules = list(sys.modules.items())
    return any(name.startswith("hydrazero.") and getattr(each, "__file__", None) == filename for name, each in modules)


class HydrazeroGroup(click.Group):
    """A group that lists its commands under headings and reports errors of users in one sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; HydrazeroError becomes 'Error: ...' and its exit status, 1 for errors of users.

        So does an OSError about a file, such as a full disk or a folder that may not be written.
        """
        try:
            with plain_warnings():
                return super().invoke(ctx)
        except HydrazeroError as error:
            echo(f"Error: {escaped(error)}", err=True)
            ctx.exit(error.exit_status)
        except MemoryError:
            echo("Error: the memory of this machine does not suffice; use smaller files or batches.", err=True)
            ctx.exit(1)
        except BrokenPipeError:
            raise  # the reader of a pipe has seen enough; click ends the process
        except OSError as error:
            if (sentence := file_fault(error)) is None:
                raise
            echo(f"Error: {escaped(sentence)}", err=True)
            ctx.exit(1)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each heading and, for each of its commands, the first line of its help, which is never cut."""
        width = max(len(name) for name in self.commands)
        for heading, commands in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{one.name:{width}}", (one.help or "").splitlines()[0]) for one in commands])


@click.group(cls=HydrazeroGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="hydrazero")
def main() -> None:
    """Train, export and use machine-learning potentials with one head per dataset."""


for _commands in SECTIONS.values():
    for _command in _commands:
        main.add_command(_command)
