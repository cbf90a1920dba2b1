"""A few steps that do not start the run: dry runs, profiles, and the measurement of `hydrazero init`."""

from __future__ import annotations

from collections.abc import Sequence

from hydrazero.shards.manifest import Manifest
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.config.tasks import task_manifests
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.rehearsal.dry_run import dry_run
from hydrazero.trainer.rehearsal.measure_steps import measure_steps
from hydrazero.trainer.rehearsal.profile_steps import profile_steps
from hydrazero.trainer.setup import CheckedRun, check_run, check_settings, check_start

PROFILE, MEASURE = "profile", "measure"


def check_rehearsal(
    kind: str, config: RunConfig, resume: bool, manifests: Sequence[Manifest] | None = None
) -> CheckedRun:
    """Check everything that can be checked before the first step; raises HydrazeroError.

    A profile does not depend on what the run folder holds. A dry run changes nothing in it, and says what it holds.
    """
    if kind == PROFILE:
        return check_settings(config, manifests=manifests)
    if kind == MEASURE or resume:
        return check_run(config, resume, manifests=manifests)
    return check_start(config, resume, manifests=manifests)


def rehearse(kind: str, config: RunConfig, resume: bool) -> None:
    """Do a 'dry-run', a 'profile' or a 'measure' on this rank; raise HydrazeroError on every rank concerned."""

    def job() -> None:
        manifests = distributed.from_first(lambda: task_manifests(config))
        checked = distributed.together(lambda: check_rehearsal(kind, config, resume, manifests))
        if kind == PROFILE:
            profile_steps(config, checked)
        elif kind == MEASURE:
            measure_steps(config, checked)
        else:
            dry_run(config, checked, resume)

    distributed.within_ranks(config.train.timeout_minutes, job)
