"""Trials as rows of reports and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydrazero.trainer.search.halving import pareto_front
from hydrazero.trainer.search.journal import REASON, RUNG, Journal
from hydrazero.trainer.search.space import Value

STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
"""Names of Optuna's states in tables; trials that have not started yet are not shown."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial."""

    number: int
    """Number of the trial."""
    state: str
    """'finished', 'pruned', 'failed' or 'running'."""
    values: dict[str, Value]
    """Values of the settings that are varied."""
    results: list[dict[str, Any]]
    """Result at each rung (see `RungResult`), with its time in seconds since 1970 under 'at'."""
    began: float
    """Start of the trial, seconds since 1970."""
    reason: str
    """Why the trial failed; empty if it did not."""

    @property
    def error(self) -> float | None:
        """Return the objective at the last rung that the trial reached; None before the first."""
        return float(self.results[-1]["error"]) if self.results else None


def trial_rows(journal: Journal) -> list[TrialRow]:
    """Return all trials that have started, ordered by number."""
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
    """Return the trials with results, ordered by the rung that they reached (last first), then by their error there."""
    return sorted((row for row in rows if row.results), key=lambda row: (-len(row.results), row.error))


@dataclass(frozen=True, kw_only=True)
class ChoiceSummary:
    """Results of the trials with one choice of a setting."""

    value: Value
    """The choice."""
    tried: int
    """Number of trials with a result."""
    finished: int
    """Number of finished trials."""
    first: float | None
    """Lowest error at the first rung; None without trials."""
    best: dict[str, Any] | None
    """Result at the last rung of the finished trial with the lowest error; None without finished trials."""


def by_choice(rows: Sequence[TrialRow], rungs: int, key: str, choices: Sequence[Value]) -> list[ChoiceSummary]:
    """Return a summary of the trials for each choice of a setting."""
    found = []
    for value in choices:
        tried = [row for row in rows if row.values.get(key) == value and row.results]
        finished = [row.results[-1] for row in tried if len(row.results) == rungs]
        found.append(
            ChoiceSummary(
                value=value,
                tried=len(tried),
                finished=len(finished),
                first=min((row.results[0]["error"] for row in tried), default=None),
                best=min(finished, key=lambda each: float(each["error"]), default=None),
            )
        )
    return found


def front_rows(rows: Sequence[TrialRow], rate: str, rungs: int) -> list[TrialRow]:
    """Return the Pareto front of error and structures per second among the finished trials, ordered by error."""
    finished = [row for row in rows if len(row.results) == rungs]
    points = [(float(row.results[-1]["error"]), -float(row.results[-1][rate])) for row in finished]
    return [finished[place] for place in pareto_front(points)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return a short name for each key: its last part if no other key has the same."""
    parts = {key: key.rpartition(".")[2] for key in keys}
    return {key: part if list(parts.values()).count(part) == 1 else key for key, part in parts.items()}


def headings_of(keys: Sequence[str]) -> list[str]:
    """Return headings for columns of the keys: their short names, with line breaks after underscores."""
    return [name.replace("_", "_\n") for name in short_names(keys).values()]


def shown_value(value: Value) -> str:
    """Return a value as a short text."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe(values: Mapping[str, Value]) -> str:
    """Return the values of a trial as one line."""
    names = short_names(list(values))
    return " ".join(f"{names[key]}={shown_value(value)}" for key, value in values.items())
