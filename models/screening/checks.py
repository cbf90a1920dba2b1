"""Checks of a screen's settings against the model, before any structure is read."""

from __future__ import annotations

from collections import Counter

import numpy as np

from hydrazero.models.inference.potential import Potential
from hydrazero.models.screening.columns import number_columns, ranking_columns, schema_of
from hydrazero.models.screening.ranking import Ranking
from hydrazero.models.screening.settings import ScreenSettings
from hydrazero.models.task_facts import NONE
from hydrazero.shards.errors import ConfigError


def check_settings(potential: Potential, settings: ScreenSettings) -> None:
    """Raise an error for settings that the model cannot fulfil.

    Raises ModelFileError for a task that the model does not have, ConfigError for results that its tasks do not give
    and for a ranking that cannot be computed.
    """
    for task in (*settings.tasks, *settings.forces):
        potential.task_index(task)
    for kind, names in (("tasks", settings.tasks), ("forces", settings.forces)):
        repeated = [task for task, count in Counter(names).items() if count > 1]
        if repeated:
            raise ConfigError(f"task '{repeated[0]}' is named twice among the {kind}; name it once.")
    if not number_columns(potential, settings):
        raise ConfigError(f"the tasks {', '.join(settings.tasks)} give no energies; request forces or other tasks.")
    for task in settings.forces:
        if task not in settings.tasks:
            raise ConfigError(f"forces of '{task}' are requested, but it is not among the tasks; add it.")
        if potential.facts(task).forces == NONE:
            raise ConfigError(f"task '{task}' has no forces; request those of another task.")
    schema = schema_of(potential, settings)
    if settings.by and settings.top is None:
        raise ConfigError(f"--by '{settings.by}' ranks the structures, but the number to keep is missing; add --top.")
    if settings.top is not None:
        if not settings.by and not potential.facts(settings.tasks[0]).has_energy:
            raise ConfigError(
                f"task '{settings.tasks[0]}' has no energies to rank by; name a task that has energies first."
            )
        ranking = Ranking(settings.ranking, ranking_columns(schema))
        ranking({name: np.ones(2) for name in ranking.columns.values()})
