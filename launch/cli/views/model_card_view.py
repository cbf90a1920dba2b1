"""The model card in the header of a model file, as tables for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from hydrazero.models.inference.model_card import Origin, model_facts
from hydrazero.models.inference.model_file import check_weights_sum, read_card, read_model
from hydrazero.shards.text.terminal import plain

SHOWN_HASH = 12
"""Number of digits of a SHA-256 checksum that are shown; '--json' prints all of them."""


def card_of(path: Path) -> dict[str, Any]:
    """Return the card of a model file, or, for an old file without one, what is known of its model.

    Raises ModelFileError as `read_card` does, and if its weights are not those that the card is about.
    """
    card = read_card(path)
    if card is not None:
        check_weights_sum(path)  # a card says nothing about other weights
        return card
    model = read_model(path)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return model_facts(model, dtype, Origin(no_errors="the file has format version 2, which contains no card"))


def describe_model(path: Path) -> RenderableType:
    """Return the card of a model file for a terminal; raise ModelFileError as `read_card` does."""
    card = card_of(path)
    about = Table.grid(padding=(0, 2))
    lines = {
        "exported": f"{card['created']} by hydrazero {card['hydrazero']}" if "created" in card else "",
        "from": card["run"],
        "encoder": f"{card['encoder']}, cutoff {card['cutoff']:g} Å",
        **({"encoder from": f"package {card['encoder_package']}"} if "encoder_package" in card else {}),
        "parameters": f"{card['parameters']:,}, {card['dtype']}; {path.stat().st_size / 1e6:.2f} MB",
        "units": ", ".join(f"{name} {unit}" for name, unit in card["units"].items()),
    }
    for name, value in lines.items():
        if value:
            about.add_row(plain(name, style="bold"), plain(value))
    parts: list[RenderableType] = [plain(str(path)), about, _tasks(card["tasks"])]
    for name, task in card["tasks"].items():
        if "undetermined" in task:
            parts.append(plain(f"task '{name}': {task['undetermined']}"))
    if "no_errors" in card:
        parts.append(plain(f"no test errors: {card['no_errors']}"))
    else:
        parts.append(_errors(card))
    return Group(*parts)


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _tasks(tasks: dict[str, Any]) -> Table:
    table = _table("tasks", ("task", "method", "predicts", "elements", "data (SHA-256)"))
    for name, task in tasks.items():
        data = f"{task['data'][:SHOWN_HASH]}…" if task["data"] else "-"
        said = task.get("untrained", {})
        predicts = ", ".join(f"{what} ({said[what]})" if what in said else what for what in task["predicts"])
        table.add_row(*map(plain, (name, task["method"], predicts, task["elements"], data)))
    return table


def _errors(card: dict[str, Any]) -> Table:
    """Return the table of mean absolute errors on the test split; targets share one column, which gives their units."""
    units = card["error_units"]
    headings = [f"{name}\n{unit}" for name, unit in units.items()]
    others = any(set(task["errors"] or {}) - {"structures", *units} for task in card["tasks"].values())
    table = _table("mean absolute errors, test split", ("task",), ("structures", *headings, *["others"] * others))
    for name, task in card["tasks"].items():
        errors = task["errors"] or {}
        numbers = [f"{errors['structures']:,}" if errors else "-"]
        numbers += [f"{errors[unit]:.2f}" if unit in errors else "-" for unit in units]
        if others:
            targets = [
                f"{target} {errors[target]:.4g} {task['predicts'][target]}"
                for target in errors
                if target not in {"structures", *units}
            ]
            numbers.append("\n".join(targets) or "-")
        table.add_row(*map(plain, (name, *numbers)))
    return table
