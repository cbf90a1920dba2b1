"""Arguments and options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hydrazero.shards.errors import ConfigError

FOLDER = click.Path(path_type=Path)
"""Type of every argument that names a file or a folder; commands check by themselves what they find there."""


class GivenOnce(click.Option):
    """An option that is refused if it is given several times, of which click itself would take the last one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "multiple": True, "callback": self._only})

    def _only(self, _: click.Context, __: click.Parameter, values: tuple[Any, ...]) -> Any:
        """Return the only value, or None; raise ConfigError if there are several."""
        if len(values) > 1:
            given = ", ".join(map(str, values))
            raise ConfigError(f"{self.opts[0]} is given {len(values)} times ({given}); give it once.")
        return values[0] if values else None


ranks_option = click.option(
    "--ranks",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of training processes on this machine.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a value of the run file. May be given several times.",
)


def task_list(text: str | None) -> list[str] | None:
    """Split 'a,b' into names; raise ConfigError if there is none."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--tasks '{text}' names no task; give names, or leave it out for all tasks.")
    return names


SITE = click.option(
    "--site", "site_name", required=True, metavar="NAME|FILE.toml", help="Cluster: the name of a site, or a site file."
)
NODES = click.option(
    "--nodes", default=1, show_default=True, type=click.IntRange(1), metavar="N", help="Number of nodes."
)
RANKS_PER_NODE = click.option(
    "--ranks-per-node",
    type=click.IntRange(1),
    metavar="N",
    help="Number of training processes on each node.  [default: one for each of the node's devices]",
)
