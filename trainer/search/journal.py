"""The state of a search that its workers share: Optuna's journal file, and locks that end with who holds them.

Everything is in `out`: `journal.log`, `run.toml` (the run file as it was at the start), `trials/NUMBER` (an ordinary
run folder each), `trials/NUMBER.txt` (what the run has printed) and `trials/NUMBER.lock`. A trial belongs to the worker
that has locked it; one that is running in the journal but locked by nobody has lost its worker, and is taken up by the
next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import AcquireReturnProxy

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import locked, try_lock
from hydrazero.trainer.search.halving import Scores, goes_on
from hydrazero.trainer.search.objective import ErrorsByTask, RungResult
from hydrazero.trainer.search.space import Choices, SearchSpace, Value, require_optuna, space_of

JOURNAL_NAME = "journal.log"
RUN_FILE_NAME = "run.toml"
LOCK_NAME = "queue.lock"
TRIALS = "trials"
STUDY = "search"
RUNG = "rung {}"
"""Attribute of a trial with what it has come to there."""
REASON = "reason"
"""Attribute of a trial that has failed."""


@dataclass(frozen=True, kw_only=True)
class HeldTrial:
    """A trial that belongs to this worker until it lets go of it."""

    number: int
    values: dict[str, Value]
    trial: Any
    """Optuna's."""
    lock: AcquireReturnProxy
    """Released at the end of a `with` block of it, or when the process ends."""


class Journal:
    """A search's journal, and what may be done with it."""

    def __init__(self, out: Path, study: Any, space: SearchSpace) -> None:
        self.out, self.study, self.space = out, study, space
        self.optuna = require_optuna()

    @property
    def run_file(self) -> Path:
        """The run file that trials share, as it was when the search began."""
        return self.out / RUN_FILE_NAME

    @property
    def trivial(self) -> ErrorsByTask:
        """ErrorsByTask of the trivial predictor."""
        found: ErrorsByTask = self.study.user_attrs["trivial"]
        return found

    def trials(self) -> list[Any]:
        """Return all trials as Optuna has them, by their numbers."""
        found: list[Any] = self.study.get_trials(deepcopy=False)
        return found

    def of_state(self, *names: str) -> list[Any]:
        """Return the trials in one of Optuna's states: COMPLETE, PRUNED, FAIL, RUNNING."""
        return [trial for trial in self.trials() if trial.state.name in names]

    def take(self, wanted: int) -> HeldTrial | None:
        """Return a trial that has lost its worker, or a new one; None if `wanted` are done or in others' hands."""
        with self._alone():
            running = self.of_state("RUNNING")
            if len(self.of_state("COMPLETE", "PRUNED")) >= wanted:
                return None
            for trial in running:
                if (lock := self._lock(trial.number)) is not None:
                    return self._held(self.optuna.trial.Trial(self.study, trial._trial_id), lock)
            if len(self.of_state("COMPLETE", "PRUNED", "RUNNING")) >= wanted:
                return None
            # Made anew for each trial: one that starts from its seed again after a stop would repeat what it has tried.
            begun = len(self.trials()) - len(self.of_state("WAITING"))
            seed = np.random.SeedSequence([self.space.search.seed, begun]).generate_state(1)[0]
            self.study.sampler = self.optuna.samplers.TPESampler(seed=int(seed), constant_liar=True)
            trial = self.study.ask()
            lock = self._lock(trial.number)
            if lock is None:
                raise ConfigError(f"{self._path(trial.number, '.lock')} is locked by a process of another search.")
            return self._held(trial, lock)

    def _held(self, trial: Any, lock: AcquireReturnProxy) -> HeldTrial:
        values = {key: parameter.suggest(trial, key) for key, parameter in self.space.vary.items()}
        return HeldTrial(number=trial.number, values=values, trial=trial, lock=lock)

    def goes_on(self, held: HeldTrial, rung: int, result: RungResult) -> bool:
        """Note what a trial has come to at a rung, and end it if that is the last one or not good enough.

        Returns whether it goes on. What has been decided before its worker was killed stays.
        """
        name, section, states = RUNG.format(rung), self.space.search, self.optuna.trial.TrialState
        last = rung == section.rungs - 1
        with self._alone():
            if name not in held.trial.user_attrs:
                others = [self.scores(each.user_attrs[name]) for each in self.trials() if name in each.user_attrs]
                stays = not last and goes_on(self.scores(result.document()), others, section.reduction)
                held.trial.set_user_attr(name, {**result.document(), "goes_on": stays, "at": time.time()})
                if not section.rate:  # the sampler learns from it; Optuna has none of these with two objectives
                    held.trial.report(result.error, step=rung)
            noted = held.trial.user_attrs[name]
            if last:
                self.study.tell(held.trial, [noted["error"], *([noted[section.rate]] if section.rate else [])])
            elif not noted["goes_on"]:
                self.study.tell(held.trial, state=states.PRUNED)
        return bool(noted["goes_on"])

    def scores(self, result: dict[str, Any]) -> Scores:
        """What trials are compared by, to be minimised, of what one has come to at a rung."""
        rate = self.space.search.rate
        return (result["error"], -result[rate]) if rate else (result["error"],)

    def fail(self, held: HeldTrial, reason: str) -> None:
        """Note that a trial cannot be trained, and why."""
        with self._alone():
            held.trial.set_user_attr(REASON, reason)
            self.study.tell(held.trial, state=self.optuna.trial.TrialState.FAIL)

    def run_dir(self, number: int) -> Path:
        """Run folder of a trial."""
        return self._path(number, "")

    def output(self, number: int) -> Path:
        """File of what a trial's run has printed."""
        return self._path(number, ".txt")

    def _path(self, number: int, ending: str) -> Path:
        return self.out / TRIALS / f"{number:04d}{ending}"

    def _lock(self, number: int) -> AcquireReturnProxy | None:
        """Lock a trial until the lock is released or this process ends, however; None if another process has it."""
        return try_lock(self._path(number, ".lock"))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other workers waiting meanwhile."""
        with locked(self.out / LOCK_NAME):
            yield


def begin_search(space: SearchSpace, text: str, trivial: ErrorsByTask) -> Journal:
    """Begin a search of a space with a run file of such a text, or go on with one that is there.

    Raises ConfigError if the folder cannot be written, or holds a search that began otherwise.
    """
    out = space.out
    try:
        (out / TRIALS).mkdir(parents=True, exist_ok=True)
        with locked(out / LOCK_NAME):
            study = _study(out, ["minimize", "maximize"][: 2 if space.search.rate else 1])
            if "trivial" not in study.user_attrs:
                (out / RUN_FILE_NAME).write_text(text, encoding="utf-8")
                study.set_user_attr("space", space.document())
                _go_through_choices(study, space)
                study.set_user_attr("trivial", trivial)  # the last of it
            began = dict(study.user_attrs)
            before = (out / RUN_FILE_NAME).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"search.out {out} cannot be written ({error.strerror}); set another one.") from error
    same = {
        str(space.path): began["space"] == space.document(),
        space.search.run: before == text,
        "the shards": began["trivial"] == trivial,
    }
    for what, holds in same.items():
        if not holds:
            raise ConfigError(
                f"{out} holds a search that began with other content of {what}; put that back to go on with it, or set "
                "another search.out for a new one."
            )
    return Journal(out, study, space)


def open_journal(out: Path) -> Journal:
    """Open the journal of a search that has begun; raises ConfigError if there is none."""
    if not (out / JOURNAL_NAME).is_file():
        raise ConfigError(f"{out} holds no search yet; start it with 'hydrazero search SPACE.toml --trials N'.")
    with locked(out / LOCK_NAME):
        study = _study(out, None)
    return Journal(out, study, space_of(study.user_attrs["space"], out / JOURNAL_NAME))


def _study(out: Path, directions: list[str] | None) -> Any:
    """Return Optuna's study, made for `directions` unless it is there."""
    optuna = require_optuna()
    # Optuna's lock is a link to this path, which it follows to see how old it is.
    path = str((out / JOURNAL_NAME).resolve())
    lock = optuna.storages.journal.JournalFileSymlinkLock(path)
    _cut_to_whole_lines(Path(path), lock)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path, lock))
    return optuna.create_study(study_name=STUDY, storage=storage, directions=directions, load_if_exists=True)


def _cut_to_whole_lines(path: Path, lock: Any) -> None:
    """Cut off a line that a full disk or a kill has left without its end: with one behind it nothing can be read."""
    if not path.is_file():
        return
    lock.acquire()  # nobody is in the middle of a line
    try:
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _go_through_choices(study: Any, space: SearchSpace) -> None:
    """Let the first trials go through all choices, each time in other combinations."""
    lists = {key: p.values for key, p in space.vary.items() if isinstance(p, Choices) and len(p.values) > 1}
    longest = max(map(len, lists.values()), default=0)
    for tried in range(space.search.tries):
        for n in range(longest):
            places = {key: (n + tried * shift) % len(lists[key]) for shift, key in enumerate(lists)}
            study.enqueue_trial({key: lists[key][place] for key, place in places.items()})
