"""The reference of the command line, read from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import click
from reference_keys import cell, prose

from hydrazero.launch.cli.options import GivenOnce

NUMBERS = {
    "integer": "whole number",
    "integer range": "whole number",
    "float": "number",
    "float range": "number",
}
"""Types of options in a user's words."""


def commands_of(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    """Walk through the commands of a group and of the groups in it, with their full names."""
    for word, command in group.commands.items():
        if command.hidden:
            continue
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def markdown_of_command(name: str, command: click.Command) -> str:
    """Return one command in Markdown: what it does, how it is called, its options."""
    context = click.Context(command, info_name=name, max_content_width=100)
    usage = " ".join(command.collect_usage_pieces(context))
    text = prose(inspect.cleandoc(command.help or "").replace("\b", ""))
    lines = [f"## {name} {{ #{anchor_of(name)} }}", "", text, "", "```text", f"{name} {usage}", "```", ""]
    options = [item for item in command.get_params(context) if isinstance(item, click.Option) and not item.hidden]
    options = [item for item in options if "--help" not in item.opts]
    if options:
        lines += ["| option | value | default | meaning |", "|---|---|---|---|"]
        lines += [_option_row(option, context) for option in options]
        lines.append("")
    return "\n".join(lines)


def _option_row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag or option.count:
        value = ""
    elif isinstance(option.type, click.Choice):
        value = " or ".join(f"`{choice}`" for choice in option.type.choices)
    elif option.metavar is None and option.type.name in NUMBERS:
        value = NUMBERS[option.type.name] + _range_words(option.type)
    else:
        value = cell(option.make_metavar(context))
    if option.multiple and not isinstance(option, GivenOnce):
        value += ", may be given several times"
    return f"| {names} | {value} | {_default(option)} | {cell(option.help or '')} |"


def _range_words(kind: Any) -> str:
    words = []
    if getattr(kind, "min", None) is not None:
        words.append(f"{'above' if kind.min_open else 'at least'} {kind.min:g}")
    if getattr(kind, "max", None) is not None:
        words.append(f"{'below' if kind.max_open else 'at most'} {kind.max:g}")
    return "".join(f", {word}" for word in words)


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    if (
        option.is_flag
        or option.multiple
        or option.default in (None, "", ())
        or not isinstance(option.default, str | int | float | tuple)
    ):
        return ""
    if isinstance(option.default, tuple):
        return f"`{' '.join(map(str, option.default))}`"
    return f"`{option.default}`"


def markdown_of_commands(group: click.Group, name: str = "hydrazero") -> str:
    """Return all commands in Markdown, after a table of them."""
    commands = list(commands_of(group, name))
    rows = [f"| [`{full}`](#{anchor_of(full)}) | {cell(_first_line(command))} |" for full, command in commands]
    overview = "\n".join(["| command | what it does |", "|---|---|", *rows])
    return "\n".join([overview, "", *(markdown_of_command(*each) for each in commands)])


def anchor_of(name: str) -> str:
    """Return the anchor of a command on its page: `convert` of 'hydrazero convert'."""
    return name.partition(" ")[2].replace(" ", "-")


def _first_line(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").partition("\n\n")[0]
