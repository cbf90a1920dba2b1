"""Importance of each setting for a trial to be among the best ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from hydrazero.trainer.search.journal import Journal
from hydrazero.trainer.search.space import require_optuna
from hydrazero.trainer.search.trial_rows import TrialRow

FEWEST = 10
"""Minimum number of trials."""
BEST_SHARE, BEST_COUNT = 0.1, 5
"""Trials that count as the best: a fraction of all, but at least this number."""


@dataclass(frozen=True, kw_only=True)
class Importances:
    """Importances of the settings that were varied."""

    values: dict[str, float]
    """Importance of each setting, largest first; they add up to 1."""
    best: int
    """Number of trials that counted as the best."""
    trials: int
    """Number of trials that were compared."""


def importances(journal: Journal, rows: Sequence[TrialRow]) -> Importances | None:
    """Return the importance of each setting by PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255).

    The errors at the first rung are compared, since all trials trained for the same time there. Return None if there
    are too few trials.
    """
    compared = [row for row in rows if row.results]
    if len(compared) < FEWEST:
        return None
    optuna = require_optuna()
    distributions = {trial.number: trial.distributions for trial in journal.trials()}
    study = optuna.create_study()
    for row in compared:
        error = row.results[0]["error"]
        study.add_trial(
            optuna.trial.create_trial(params=row.values, distributions=distributions[row.number], value=error)
        )
    share = max(BEST_SHARE, BEST_COUNT / len(compared))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return Importances(values=found, best=round(share * len(compared)), trials=len(compared))
