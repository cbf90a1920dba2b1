"""The state of a search that its workers share: Optuna's journal file, and a lock for each trial.

The folder `out` contains `journal.log`, `run.toml` (the run file as it was at the start) and, for each trial, the run
folder `trials/NUMBER`, its output `trials/NUMBER.txt` and the lock `trials/NUMBER.lock`. A trial belongs to the worker
that holds its lock. If the journal lists a trial as running but no process holds its lock, its worker has ended, and
the next worker resumes it.
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
from hydrazero.trainer.search.halving import Scores, is_promoted
from hydrazero.trainer.search.objective import ErrorsByTask, RungResult
from hydrazero.trainer.search.space import Choices, SearchSpace, Value, require_optuna, space_of

JOURNAL_NAME = "journal.log"
RUN_FILE_NAME = "run.toml"
LOCK_NAME = "queue.lock"
TRIALS = "trials"
STUDY = "search"
RUNG = "rung {}"
"""Attribute of a trial with its result at a rung."""
REASON = "reason"
"""Attribute of a failed trial with the reason."""


@dataclass(frozen=True, kw_only=True)
class HeldTrial:
    """A trial whose lock this worker holds."""

    number: int
    """Number of the trial."""
    values: dict[str, Value]
    """Values of the settings that are varied."""
    trial: Any
    """The trial as an object of Optuna."""
    lock: AcquireReturnProxy
    """The lock, which is released at the end of its `with` block or when the process ends."""


class Journal:
    """The journal of a search."""

    def __init__(self, out: Path, study: Any, space: SearchSpace) -> None:
        self.out, self.study, self.space = out, study, space
        self.optuna = require_optuna()

    @property
    def run_file(self) -> Path:
        """Return the path of the run file that trials share, as it was when the search began."""
        return self.out / RUN_FILE_NAME

    @property
    def trivial(self) -> ErrorsByTask:
        """Return the errors of the trivial predictor."""
        found: ErrorsByTask = self.study.user_attrs["trivial"]
        return found

    def trials(self) -> list[Any]:
        """Return all trials as objects of Optuna, ordered by number."""
        found: list[Any] = self.study.get_trials(deepcopy=False)
        return found

    def of_state(self, *names: str) -> list[Any]:
        """Return the trials in one of Optuna's states: COMPLETE, PRUNED, FAIL, RUNNING."""
        return [trial for trial in self.trials() if trial.state.name in names]

    def take(self, wanted: int) -> HeldTrial | None:
        """Lock and return a trial whose worker has ended, or a new one.

        Return None if `wanted` trials are complete or other workers train the remaining ones.
        """
        with self._alone():
            running = self.of_state("RUNNING")
            if len(self.of_state("COMPLETE", "PRUNED")) >= wanted:
                return None
            for trial in running:
                if (lock := self._lock(trial.number)) is not None:
                    return self._held(self.optuna.trial.Trial(self.study, trial._trial_id), lock)
            if len(self.of_state("COMPLETE", "PRUNED", "RUNNING")) >= wanted:
                return None
            # A sampler that starts from its seed after each interruption would repeat its first values, so each trial
            # has its own seed.
            begun = len(self.trials()) - len(self.of_state("WAITING"))
            seed = np.random.SeedSequence([self.space.search.seed, begun]).generate_state(1)[0]
            self.study.sampler = self.optuna.samplers.TPESampler(seed=int(seed), constant_liar=True)
            trial = self.study.ask()
            lock = self._lock(trial.number)
            if lock is None:
                path = self._path(trial.number, ".lock")
                raise ConfigError(f"{path} is locked by a process of another search; set another search.out.")
            return self._held(trial, lock)

    def _held(self, trial: Any, lock: AcquireReturnProxy) -> HeldTrial:
        values = {key: parameter.suggest(trial, key) for key, parameter in self.space.vary.items()}
        return HeldTrial(number=trial.number, values=values, trial=trial, lock=lock)

    def promote(self, held: HeldTrial, rung: int, result: RungResult) -> bool:
        """Record a trial's result at a rung, end it unless it is promoted, and return whether it is.

        A decision that was recorded before the trial's worker was killed is kept.
        """
        name, section, states = RUNG.format(rung), self.space.search, self.optuna.trial.TrialState
        last = rung == section.rungs - 1
        with self._alone():
            if name not in held.trial.user_attrs:
                others = [self.scores(each.user_attrs[name]) for each in self.trials() if name in each.user_attrs]
                promoted = not last and is_promoted(self.scores(result.document()), others, section.reduction)
                held.trial.set_user_attr(name, {**result.document(), "goes_on": promoted, "at": time.time()})
                if not section.rate:  # the sampler learns from it; Optuna does not support it with two objectives
                    held.trial.report(result.error, step=rung)
            noted = held.trial.user_attrs[name]
            if last:
                self.study.tell(held.trial, [noted["error"], *([noted[section.rate]] if section.rate else [])])
            elif not noted["goes_on"]:
                self.study.tell(held.trial, state=states.PRUNED)
        return bool(noted["goes_on"])

    def scores(self, result: dict[str, Any]) -> Scores:
        """Return the objectives of a result at a rung, all of which are minimised."""
        rate = self.space.search.rate
        return (result["error"], -result[rate]) if rate else (result["error"],)

    def fail(self, held: HeldTrial, reason: str) -> None:
        """Record that a trial failed, with the reason."""
        with self._alone():
            held.trial.set_user_attr(REASON, reason)
            self.study.tell(held.trial, state=self.optuna.trial.TrialState.FAIL)

    def run_dir(self, number: int) -> Path:
        """Return the run folder of a trial."""
        return self._path(number, "")

    def output(self, number: int) -> Path:
        """Return the file with the output of a trial's run."""
        return self._path(number, ".txt")

    def _path(self, number: int, ending: str) -> Path:
        return self.out / TRIALS / f"{number:04d}{ending}"

    def _lock(self, number: int) -> AcquireReturnProxy | None:
        """Lock a trial until the lock is released or this process ends; None if another process holds the lock."""
        return try_lock(self._path(number, ".lock"))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of the search, for which other workers wait."""
        with locked(self.out / LOCK_NAME):
            yield


def begin_search(space: SearchSpace, text: str, trivial: ErrorsByTask) -> Journal:
    """Begin the search of a space, or continue it if its folder exists.

    `text` is the content of the run file, and `trivial` holds the errors of the trivial predictor. Raise ConfigError if
    the folder cannot be written, or contains a search that began with another space, run file or other shards.
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
                study.set_user_attr("trivial", trivial)  # written last, so that a search that has it is complete
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
                f"{out} contains a search that began with other content of {what}; restore that to continue it, or set "
                "another search.out to begin a new search."
            )
    return Journal(out, study, space)


def open_journal(out: Path) -> Journal:
    """Open the journal of an existing search; raise ConfigError if there is none."""
    if not (out / JOURNAL_NAME).is_file():
        raise ConfigError(f"{out} contains no search yet; start one with 'hydrazero search SPACE.toml --trials N'.")
    with locked(out / LOCK_NAME):
        study = _study(out, None)
    return Journal(out, study, space_of(study.user_attrs["space"], out / JOURNAL_NAME))


def _study(out: Path, directions: list[str] | None) -> Any:
    """Return Optuna's study, which is made with the given directions of its objectives if it does not exist."""
    optuna = require_optuna()
    # Optuna's lock is a symbolic link to this path, and Optuna follows it to find the age of the lock.
    path = str((out / JOURNAL_NAME).resolve())
    lock = optuna.storages.journal.JournalFileSymlinkLock(path)
    _cut_to_whole_lines(Path(path), lock)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path, lock))
    return optuna.create_study(study_name=STUDY, storage=storage, directions=directions, load_if_exists=True)


def _cut_to_whole_lines(path: Path, lock: Any) -> None:
    """Remove an incomplete last line, which a full disk or a killed process may leave.

    Optuna could not read the file any more if another line followed it.
    """
    if not path.is_file():
        return
    lock.acquire()  # no process is writing a line now
    try:
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _go_through_choices(study: Any, space: SearchSpace) -> None:
    """Enqueue first trials that contain every choice of the lists, in different combinations."""
    lists = {key: p.values for key, p in space.vary.items() if isinstance(p, Choices) and len(p.values) > 1}
    longest = max(map(len, lists.values()), default=0)
    for repeat in range(space.search.tries):
        for n in range(longest):
            places = {key: (n + repeat * shift) % len(lists[key]) for shift, key in enumerate(lists)}
            study.enqueue_trial({key: lists[key][place] for key, place in places.items()})
