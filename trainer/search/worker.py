"""One worker of a search: it trains trials from rung to rung and records their results in the journal.

    python -m hydrazero.trainer.search.worker OUT --trials N

Several workers may share a journal, on one machine or on several.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import click

from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.files import without_links
from hydrazero.shards.launcher_variables import forget_launcher
from hydrazero.shards.processes import end_with_parent
from hydrazero.shards.text.foreign_text import echo
from hydrazero.trainer.checkpoint.folders import CHECKPOINTS
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.ranks.exit_status import FAILED, end_process_after
from hydrazero.trainer.ranks.launcher import Ranks, train_command
from hydrazero.trainer.records.run_files import RUN_NAME
from hydrazero.trainer.search.journal import HeldTrial, Journal, open_journal
from hydrazero.trainer.search.objective import RungResult, result_at
from hydrazero.trainer.search.trial_rows import describe
from hydrazero.trainer.search.trial_settings import search_overrides, trial_overrides

STOPPED = 3
"""Exit status of a worker that was asked to stop; its trial is resumed when the search continues."""
MOST_FAILURES = 10
"""Number of failed trials in a row after which the search stops."""


class TrialFailedError(HydrazeroError):
    """A trial cannot be trained, or its run failed; the search continues with other trials."""


class SearchStoppedError(HydrazeroError):
    """A worker was asked to stop."""

    exit_status = STOPPED


def work(journal: Journal, wanted: int) -> None:
    """Train trials until `wanted` are complete or taken by others; raise SearchStoppedError if asked to stop."""
    while (held := journal.take(wanted)) is not None:
        with held.lock:
            try:
                run_trial(journal, held)
            except TrialFailedError as error:
                journal.fail(held, str(error))
                echo(f"trial {held.number} failed: {error}  {describe(held.values)}")
        _check_failures(journal)


def run_trial(journal: Journal, held: HeldTrial) -> None:
    """Train a trial until it is finished or pruned; raise TrialFailedError if it fails."""
    for rung, seconds in enumerate(journal.space.rungs):
        result = result_at(journal.run_dir(held.number), seconds, journal.trivial)
        if result is None:
            result = _train(journal, held, seconds)
        if not math.isfinite(result.error):
            raise TrialFailedError("its validation errors are not finite")
        if not journal.promote(held, rung, result):
            pruned = rung < len(journal.space.rungs) - 1
            if pruned:  # never used again
                shutil.rmtree(journal.run_dir(held.number) / CHECKPOINTS, ignore_errors=True)
            state = "pruned" if pruned else "finished"
            echo(f"trial {held.number} {state} at {seconds:g} s: {result.error:.4f}  {describe(held.values)}")
            return


def _train(journal: Journal, held: HeldTrial, seconds: float) -> RungResult:
    """Train a trial up to a rung; raise TrialFailedError if it fails, SearchStoppedError if it is stopped before."""
    run_dir = journal.run_dir(held.number)
    resume = (run_dir / RUN_NAME).exists()
    options = _options(journal, held, seconds)
    with open(journal.output(held.number), "ab", opener=without_links) as output:
        resuming = ["--resume"] if resume else []
        command = [*train_command(journal.run_file), *options, *resuming]
        with Ranks(command, journal.space.search.ranks, output) as running:
            outcome = running.wait(end_together=True)
    result = result_at(run_dir, seconds, journal.trivial)
    # A run that was asked to stop may still have reached the rung; that is found when the trial is resumed.
    if running.asked_to_stop or (outcome.status == 0 and result is None):
        raise SearchStoppedError(f"trial {held.number} was stopped; the same command resumes it.")
    if outcome.status == 0 and result is not None:
        return result
    said = _last_line(journal.output(held.number))
    raise TrialFailedError(f"{outcome.reason} ({said})" if outcome.reason else said)


def _options(journal: Journal, held: HeldTrial, seconds: float) -> list[str]:
    """Return the options of a trial's run; raise TrialFailedError if its values cannot be combined."""
    from hydrazero.trainer.setup import check_settings

    base = load_run_config(journal.run_file)
    ds_config = deepspeed_config(base.deepspeed, base.train.steps)
    try:
        overrides = trial_overrides(journal.run_file, held.values)
        # The trial's values come last, since they may contain a warm-up.
        overrides = [*search_overrides(ds_config, journal.run_dir(held.number), seconds), *overrides]
        check_settings(load_run_config(journal.run_file, overrides))
    except HydrazeroError as error:
        raise TrialFailedError(str(error).rstrip(".")) from error
    return [word for override in overrides for word in ("--set", override)]


def _last_line(output: Path) -> str:
    """Return the last line that a run printed: the sentence of an error, or the last line of a traceback."""
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("Error: ").rstrip(".") if lines else "it printed nothing"


def _check_failures(journal: Journal) -> None:
    """Raise HydrazeroError if the last trials have all failed."""
    ended = journal.of_state("COMPLETE", "PRUNED", "FAIL")[-MOST_FAILURES:]
    if len(ended) == MOST_FAILURES and all(trial.state.name == "FAIL" for trial in ended):
        last = ended[-1]
        raise HydrazeroError(
            f"the last {MOST_FAILURES} trials have all failed; the reason for trial {last.number} was: "
            f"{last.user_attrs['reason']}. Check {journal.output(last.number)} and the space file."
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--trials", required=True, type=click.IntRange(1))
@click.option("--launched-by", default=None, type=int, hidden=True)  # the process id of `hydrazero search`
def main(out: Path, trials: int, launched_by: int | None) -> None:
    """Work on the search in OUT until TRIALS are complete."""
    if launched_by is not None:
        end_with_parent(launched_by, FAILED)
    forget_launcher()  # a launcher's ranks are workers here, not the ranks of a trial
    end_process_after(
        lambda: work(open_journal(out), trials),
        interrupted=STOPPED,
        prints=lambda error: not isinstance(error, SearchStoppedError),
    )


if __name__ == "__main__":
    main()
