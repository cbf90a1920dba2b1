"""What a screen is told, and what its rows hold."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydrazero.models.inference.potential import Potential
from hydrazero.models.task_facts import NONE
from hydrazero.shards.errors import ConfigError, did_you_mean

CHUNK = 1024
"""Structures in a chunk: what a reader takes over at a time, and what is either done or not when a screen goes on."""
REACHED = "converged"
"""Column, and target of a relaxed structure: whether its forces became small before its steps ran out."""


@dataclass(frozen=True, kw_only=True)
class ScreenSettings:
    """What to compute and keep."""

    tasks: tuple[str, ...]
    """Heads; the first one ranks the structures unless `by` says otherwise."""
    forces: tuple[str, ...] = ()
    """Heads, of `tasks`, that give forces too: a pass with derivatives for each."""
    top: int | None = None
    """Keep only so many structures, those of lowest `by`."""
    by: str = ""
    """Expression of columns; by default the first task's energy above its references, per atom."""
    max_atoms: int = 10_000
    """Structures of more atoms are not computed."""
    relax: int = 0
    """Steps for which structures are relaxed at most, by the first task, before all tasks see them."""

    @property
    def ranking(self) -> str:
        """The expression that ranks."""
        return self.by or f"interaction_per_atom_{self.tasks[0]}"

    def record(self) -> dict[str, Any]:
        """Return what rows depend on, as plain types."""
        return {**asdict(self), "tasks": list(self.tasks), "forces": list(self.forces), "chunk": CHUNK}


def number_columns(potential: Potential, settings: ScreenSettings) -> list[str]:
    """Names of the columns of numbers that a structure gets from the heads, eV or eV/Å."""
    names = []
    for task in settings.tasks:
        if potential.facts(task).has_energy:
            names += [f"energy_{task}", f"interaction_per_atom_{task}"]
            names += [f"energy_spread_{task}"] if potential.has_spread else []
    return names + [f"max_force_{task}" for task in settings.forces]


def schema_of(potential: Potential, settings: ScreenSettings) -> pa.Schema:
    """Columns of a screen."""
    columns = [("index", pa.int64()), ("source_id", pa.string()), ("formula", pa.string()), ("atoms", pa.int32())]
    columns += [(name, pa.float64()) for name in number_columns(potential, settings)]
    columns += [(f"forces_{task}", pa.list_(pa.float32())) for task in settings.forces]
    if settings.relax:
        columns += [("positions", pa.list_(pa.float64())), ("cell", pa.list_(pa.float64())), (REACHED, pa.bool_())]
    return pa.schema([*columns, ("reason", pa.string())])


def rankable(schema: pa.Schema) -> list[str]:
    """Names of the columns of numbers that `by` may hold."""
    return [field.name for field in schema if field.type == pa.float64()] + ["atoms"]


def check_settings(potential: Potential, settings: ScreenSettings) -> None:
    """Raise ModelFileError for a task that the model does not have, ConfigError for what it cannot give or rank."""
    for task in (*settings.tasks, *settings.forces):
        potential.task_index(task)
    for kind, names in (("tasks", settings.tasks), ("forces", settings.forces)):
        twice = [task for task, count in Counter(names).items() if count > 1]
        if twice:
            raise ConfigError(f"task '{twice[0]}' is named twice among the {kind}; name it once.")
    if not number_columns(potential, settings):
        raise ConfigError(f"{', '.join(settings.tasks)} give no energies; ask for forces, or for other tasks.")
    for task in settings.forces:
        if task not in settings.tasks:
            raise ConfigError(f"forces by '{task}' are asked for, but it is not among the tasks; add it.")
        if potential.facts(task).forces == NONE:
            raise ConfigError(f"task '{task}' has no forces; ask for those of another task.")
    if settings.by and settings.top is None:
        raise ConfigError(f"--by '{settings.by}' ranks, but --top does not say how many structures to keep.")
    if settings.top is not None:
        if not settings.by and not potential.facts(settings.tasks[0]).has_energy:
            raise ConfigError(f"task '{settings.tasks[0]}' has no energies to rank by; name one that has first.")
        ranking = Ranking(settings.ranking, rankable(schema_of(potential, settings)))
        ranking({name: np.ones(2) for name in ranking.columns.values()})


class Ranking:
    """A number for each structure, of an expression of its columns."""

    def __init__(self, expression: str, known: Sequence[str]) -> None:
        """Raise ConfigError for what is no expression, or names a column that is not known."""
        self.expression, self._evaluator = expression, importlib.import_module("numexpr")
        # A task's name may hold what would be a minus in an expression.
        names = {f"c{number}": name for number, name in enumerate(known)}
        plain = {name: alias for alias, name in names.items()}
        longest_first = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
        self._plain = re.sub(rf"(?<!\w)({longest_first})(?!\w)", lambda found: plain[found[0]], expression)
        # Without whole numbers: numexpr works out 9**9**9 before anything else, and never ends.
        self._plain = re.sub(r"(?<![\w.])(?<![\d.][eE][-+])(\d+)(?![\w.])", r"\1.0", self._plain)
        try:
            used = list(self._evaluator.NumExpr(self._plain).input_names)
        except Exception as error:  # of many kinds, by what is wrong with the text
            raise ConfigError(f"--by '{expression}' is no expression of columns ({_first_line(error)}).") from error
        for name in used:
            if name not in names:
                near = did_you_mean(name, list(known)) or f"; known are {', '.join(known)}"
                raise ConfigError(f"--by '{expression}': there is no column '{name}'{near}.")
        if not used:
            raise ConfigError(f"--by '{expression}' names no column; known are {', '.join(known)}.")
        self.columns = {name: names[name] for name in used}
        """Name in the expression -> column."""

    def __call__(self, columns: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Return the values, NaN where a column has none; raises ConfigError if they are no numbers."""
        given = {name: np.asarray(columns[column], dtype=np.float64) for name, column in self.columns.items()}
        try:
            found = np.asarray(self._evaluator.evaluate(self._plain, given, {}))
            rows = len(next(iter(given.values())))
            if found.shape != (rows,) or found.dtype.kind == "c":
                raise ValueError("it does not give one real number for each structure")
            return found.astype(np.float64)
        except (TypeError, ValueError, NotImplementedError, KeyError) as error:
            raise ConfigError(f"--by '{self.expression}' cannot be computed ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
