"""A few steps of a run that start no run: --dry-run and --profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydrazero.shards.manifest import Manifest
from hydrazero.shards.stream.stream import TrainStream
from hydrazero.trainer.balance import BalanceFacts
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.config.tasks import task_manifests
from hydrazero.trainer.engine.run_balance import RunBalance
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.engine.weight_average import WeightAverage
from hydrazero.trainer.loop import RunParts, Trainer
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.run_log import RunLog
from hydrazero.trainer.train import CheckedRun, check_run, check_settings, on_ranks, stream_settings

PROFILE = "profile"


def check_trial(kind: str, config: RunConfig, resume: bool, manifests: Sequence[Manifest] | None = None) -> CheckedRun:
    """Check everything that can be checked before the first step; raises HydrazeroError.

    A profile does not care for what the run's folder holds.
    """
    if kind == PROFILE:
        return check_settings(config, manifests=manifests)
    return check_run(config, resume, manifests=manifests)


def run_trial(kind: str, config: RunConfig, resume: bool) -> None:
    """Do a 'dry-run' or a 'profile' on this rank; raises HydrazeroError on every rank that a fault concerns."""
    from hydrazero.trainer.rehearsal.dry_run import dry_run
    from hydrazero.trainer.rehearsal.profile_steps import profile_steps

    def job() -> None:
        manifests = distributed.from_first(lambda: task_manifests(config))
        checked = distributed.together(lambda: check_trial(kind, config, resume, manifests))
        if kind == PROFILE:
            profile_steps(config, checked)
        else:
            dry_run(config, checked, resume)

    on_ranks(config, job)


class TrialLog(RunLog):
    """A log that is never entered, and so writes nothing; what is said is kept."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, 0)
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        """Keep a sentence."""
        self.said.append(sentence)


def trial_trainer(config: RunConfig, checked: CheckedRun, engine: Any, log: TrialLog) -> Trainer:
    """Return a trainer as a run has it, but for its log, which writes nothing."""
    settings = stream_settings(config, checked)
    return Trainer(
        config,
        RunParts(
            engine=engine,
            stream=TrainStream(settings, distributed.rank(), distributed.ranks()),
            balance=RunBalance(config.balance, BalanceFacts(structures=checked.structures()), engine.module),
            average=WeightAverage(engine, config.train.average) if config.train.average else None,
            guard=StepGuard(config.train.max_skipped, config.train.skip_spikes),
            stop=StopRequest(0.0),
            log=log,
        ),
    )
