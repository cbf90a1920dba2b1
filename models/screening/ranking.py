"""Ranking of screened structures by an expression of their columns, and the rows that rank lowest."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydrazero.models.screening.columns import ranking_columns
from hydrazero.models.screening.settings import CHUNK, ScreenSettings
from hydrazero.shards.errors import ConfigError, did_you_mean


class Ranking:
    """An expression of columns that gives each structure the number by which it is ranked."""

    def __init__(self, expression: str, known: Sequence[str]) -> None:
        """Raise ConfigError for text that is not an expression, or that contains a column that is not in `known`."""
        self.expression, self._evaluator = expression, importlib.import_module("numexpr")
        # The name of a task may contain a dash, which would be a minus in an expression. Columns therefore get aliases.
        names = {f"c{number}": name for number, name in enumerate(known)}
        aliases = {name: alias for alias, name in names.items()}
        longest_first = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
        self._plain = re.sub(rf"(?<!\w)({longest_first})(?!\w)", lambda match: aliases[match[0]], expression)
        # Integers become floats, because numexpr would evaluate 9**9**9 exactly before anything else, and never end.
        self._plain = re.sub(r"(?<![\w.])(?<![\d.][eE][-+])(\d+)(?![\w.])", r"\1.0", self._plain)
        try:
            used = list(self._evaluator.NumExpr(self._plain).input_names)
        except Exception as error:  # numexpr raises exceptions of many types
            raise ConfigError(f"--by '{expression}' is not an expression of columns ({_first_line(error)}).") from error
        for name in used:
            if name not in names:
                near = did_you_mean(name, list(known)) or f"; the columns are {', '.join(known)}"
                raise ConfigError(f"--by '{expression}': there is no column '{name}'{near}.")
        if not used:
            raise ConfigError(f"--by '{expression}' names no column; the columns are {', '.join(known)}.")
        self.columns = {name: names[name] for name in used}
        """Column of each name in the expression."""

    def __call__(self, columns: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Return the value of each row, NaN where a column has none.

        Raises ConfigError if the expression does not give one real number per row.
        """
        inputs = {name: np.asarray(columns[column], dtype=np.float64) for name, column in self.columns.items()}
        try:
            values = np.asarray(self._evaluator.evaluate(self._plain, inputs, {}))
            rows = len(next(iter(inputs.values())))
            if values.shape != (rows,) or values.dtype.kind == "c":
                raise ValueError("it does not give one real number for each structure")
            return values.astype(np.float64)
        except (TypeError, ValueError, NotImplementedError, KeyError) as error:
            raise ConfigError(f"--by '{self.expression}' cannot be computed ({_first_line(error)}).") from error


class TopRows:
    """The rows that rank lowest among all that were added."""

    def __init__(self, settings: ScreenSettings, schema: pa.Schema) -> None:
        self.top = settings.top or 0
        self._ranking = Ranking(settings.ranking, ranking_columns(schema))
        self._tables: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Add a table's rows to those that are compared."""
        self._tables.append(table)
        self._rows += table.num_rows
        if self._rows > 2 * self.top + CHUNK:
            self._keep_lowest()

    def _keep_lowest(self) -> None:
        table = pa.concat_tables(self._tables)
        first = np.unique(table["index"].to_numpy(), return_index=True)[1]
        table = table.take(pa.array(first))  # two parts may hold the same chunk
        values = {name: table[name].to_numpy().astype(np.float64) for name in self._ranking.columns.values()}
        # Structures without numbers are left out even if the expression has a value for them.
        ranked = table["reason"].is_null().to_numpy()
        for column in values.values():
            ranked &= np.isfinite(column)
        rank = self._ranking(values) if table.num_rows else np.zeros(0)
        ranked &= np.isfinite(rank)
        # Equal ranks are in the order of the sources, so that the result does not depend on the number of ranks.
        order = np.lexsort((table["index"].to_numpy(), rank))
        order = order[ranked[order]][: self.top]
        self._tables, self._rows = [table.take(pa.array(order))], len(order)

    def table(self) -> pa.Table:
        """Return the rows that rank lowest, in ascending order."""
        self._keep_lowest()
        return self._tables[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
