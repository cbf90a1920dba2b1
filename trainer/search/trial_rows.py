"""Trials as reports and tables show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Name keys by their last part where that tells them apart."""
    parts = {key: key.rpartition(".")[2] for key in keys}
    return {key: part if list(parts.values()).count(part) == 1 else key for key, part in parts.items()}


def shown_value(value: Value) -> str:
    """Show a value in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe(values: Mapping[str, Value]) -> str:
    """Show the values of a trial in one line."""
    names = short_names(list(values))
    return " ".join(f"{names[key]}={shown_value(value)}" for key, value in values.items())
