"""Trials as reports and tables show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydrazero.trainer.search.halving import pareto_front
from hydrazero.trainer.search.journal import REASON, RUNG, Journal
from hydrazero.trainer.search.space import Value

STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
"""What is said of Optuna's states; those that wait for their turn are not shown."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial."""

    number: int
    state: str
    """'finished', 'pruned', 'failed' or 'running'."""
    values: dict[str, Value]
    results: list[dict[str, Any]]
    """What it has come to at each rung (see `RungResult`), and when: 'at', seconds since 1970."""
    began: float
    """Seconds since 1970."""
    reason: str
    """Why it has failed."""

    @property
    def error(self) -> float | None:
        """The objective at the last rung that it has come to."""
        return float(self.results[-1]["error"]) if self.results else None


def trial_rows(journal: Journal) -> list[TrialRow]:
    """Return all trials that have begun, by their numbers."""
    rows = []
    for trial in journal.of_state(*STATES):
        names = [RUNG.format(rung) for rung in range(journal.space.search.rungs)]
        rows.append(
            TrialRow(
                number=trial.number,
                state=STATES[trial.state.name],
                values={key: trial.params[key] for key in journal.space.vary if key in trial.params},
                results=[trial.user_attrs[name] for name in names if name in trial.user_attrs],
                began=trial.datetime_start.timestamp(),
                reason=trial.user_attrs.get(REASON, ""),
            )
        )
    return rows


def ranked(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return trials with results, the best first: by how far they have come, then by their errors there."""
    return sorted((row for row in rows if row.results), key=lambda row: (-len(row.results), row.error))


@dataclass(frozen=True, kw_only=True)
class OfChoice:
    """What trials with one choice of a setting have come to."""

    value: Value
    tried: int
    finished: int
    first: float | None
    """Lowest error at the first rung."""
    best: dict[str, Any] | None
    """Result at the last rung of the finished one with the lowest error."""


def by_choice(rows: Sequence[TrialRow], rungs: int, key: str, choices: Sequence[Value]) -> list[OfChoice]:
    """Sum up trials by what they have chosen of a setting."""
    found = []
    for value in choices:
        tried = [row for row in rows if row.values.get(key) == value and row.results]
        finished = [row.results[-1] for row in tried if len(row.results) == rungs]
        found.append(
            OfChoice(
                value=value,
                tried=len(tried),
                finished=len(finished),
                first=min((row.results[0]["error"] for row in tried), default=None),
                best=min(finished, key=lambda each: float(each["error"]), default=None),
            )
        )
    return found


def front_rows(rows: Sequence[TrialRow], rate: str, rungs: int) -> list[TrialRow]:
    """Return the finished trials that no other finished one beats in both error and structures/s, by their errors."""
    finished = [row for row in rows if len(row.results) == rungs]
    points = [(float(row.results[-1]["error"]), -float(row.results[-1][rate])) for row in finished]
    return [finished[place] for place in pareto_front(points)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Name keys by their last part where that tells them apart."""
    parts = {key: key.rpartition(".")[2] for key in keys}
    return {key: part if list(parts.values()).count(part) == 1 else key for key, part in parts.items()}


def headings_of(keys: Sequence[str]) -> list[str]:
    """Return short names that may break at their underscores, for columns of numbers."""
    return [name.replace("_", "_\n") for name in short_names(keys).values()]


def shown_value(value: Value) -> str:
    """Show a value in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe(values: Mapping[str, Value]) -> str:
    """Show the values of a trial in one line."""
    names = short_names(list(values))
    return " ".join(f"{names[key]}={shown_value(value)}" for key, value in values.items())
