"""Verdicts on the attempts of a job: which rank failed first and why, and whether the job should be restarted."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hydrazero.launch.node.records import (
    ATTEMPTS,
    BY_SHELL,
    JOB_NAME,
    LAUNCH,
    SIGN_EVERY,
    VERDICT_NAME,
    AttemptRecords,
    RankLife,
    read_attempt,
)
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_json, write_json
from hydrazero.trainer.checkpoint.folders import checkpoints, step_of
from hydrazero.trainer.ranks.exit_status import MAY_PASS
from hydrazero.trainer.records.run_files import RUN_NAME, read_run_json

FINISHED, STOPPED, CANCELLED, FAILED, REFUSED = "finished", "stopped", "cancelled", "failed", "refused"
"""Kinds of end: the run is complete or has stopped by itself; the time of the job was over; somebody ended it; it
failed and may succeed if it is restarted; it failed with an error that would happen again."""
RESTART, GIVE_UP = MAY_PASS, 1
"""Exit statuses of `hydrazero postmortem` besides 0."""
SHOWN_RANKS = 8
SHOWN_LINES = 12
SILENT = 3 * SIGN_EVERY
"""A node that has given no sign of life for this number of seconds longer than the others was lost first."""
LOOK_EVERY = 1.0
"""Seconds between two readings of the ranks' records."""


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """The progress of a run."""

    step: int
    """Step of the last complete checkpoint."""
    steps: int
    """Total number of steps; 0 if the run has not started."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on an attempt."""

    kind: str
    """FINISHED, STOPPED, CANCELLED, FAILED or REFUSED."""
    sentence: str
    """Description for the user."""
    details: tuple[str, ...]
    """Lines on the ranks in the order in which they ended, and the last output of the first one."""
    step: int
    """Step of the last checkpoint at its end."""


def progress_of(run_dir: Path) -> RunProgress:
    """Return the progress of a run."""
    found = checkpoints(run_dir)
    step = step_of(found[-1]) if found else 0
    if not (run_dir / RUN_NAME).exists():
        return RunProgress(step=step, steps=0)
    record = read_run_json(run_dir, RUN_NAME)
    resumes = record.get("resumes") or [{"steps": record["train"]["steps"]}]
    return RunProgress(step=step, steps=int(resumes[-1]["steps"]))


def judge_attempts(run_dir: Path, wait: float = 0.0) -> list[tuple[Path, Verdict]]:
    """Judge the attempts that have not been judged yet; return the folders and verdicts of all of them, in order.

    Ranks of the last attempt that are still running are waited for, `wait` seconds at most. Raise ConfigError if the
    run was never launched as a job.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"there is no folder {run_dir}; give the folder of a run.")
    folders = sorted((run_dir / LAUNCH).glob(ATTEMPTS))
    if not folders:
        raise ConfigError(
            f"{run_dir} holds no attempts of a job ({LAUNCH}/{ATTEMPTS}); was the run started by hydrazero launch?"
        )
    verdicts = []
    for folder in folders:
        kept = folder / VERDICT_NAME
        if kept.is_file():
            table = read_json(kept, shape=Verdict, hint="remove it, and the attempt is judged again")
            known = {each.name: table[each.name] for each in fields(Verdict)}
            verdict = Verdict(**{**known, "details": tuple(known["details"])})
        else:
            if folder == folders[-1]:
                wait_for_ends(folder, wait)
            verdict = judge(read_attempt(folder), progress_of(run_dir))
            write_json(kept, asdict(verdict))
        verdicts.append((folder, verdict))
    return verdicts


def wait_for_ends(folder: Path, seconds: float) -> None:
    """Return when every rank of an attempt has recorded its end or its node has fallen silent, or after `seconds`.

    A launcher may end before ranks on other hosts do, which may still be writing a checkpoint.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        alive_since = time.time() - SILENT
        if all(life.ended is not None or life.last_sign < alive_since for life in read_attempt(folder).ranks):
            return
        time.sleep(min(LOOK_EVERY, max(until - time.monotonic(), 0.0)))


def should_restart(verdicts: Sequence[Verdict], retries: int) -> tuple[bool, str]:
    """Return whether a job should be restarted after its last attempt, and a sentence on why not if it is of use."""
    last, before = verdicts[-1], verdicts[-2].step if len(verdicts) > 1 else 0
    if last.kind == STOPPED:
        further = last.step > before
        return further, "" if further else "its time was over before it made any progress; request more hours."
    if last.kind != FAILED:
        return False, ""
    in_a_row = 0
    for verdict in reversed(verdicts):
        if verdict.kind != FAILED or verdict.step < last.step:
            break
        in_a_row += 1
    if in_a_row <= retries:
        return True, ""
    failed = f"it has failed {in_a_row} times without a new checkpoint; " if retries else ""
    return False, f"{failed}fix the cause, then restart it with hydrazero launch --resume."


def judge(records: AttemptRecords, progress: RunProgress) -> Verdict:
    """Return how an attempt ended; if its job received SIGTERM, it was cancelled, whatever happened afterwards."""
    verdict = _judged(records, progress)
    if "SIGTERM" in records.signals and verdict.kind in (FAILED, STOPPED):
        return replace(verdict, kind=CANCELLED, sentence=f"cancelled by SIGTERM: {verdict.sentence}")
    return verdict


def _judged(records: AttemptRecords, progress: RunProgress) -> Verdict:
    at = f"at step {progress.step} of {progress.steps}" if progress.steps else "before its first step"
    if records.unfit:
        return _verdict(FAILED, f"no rank has started: nodes failed the check ({_unfit(records)})", (), progress)
    if not records.ranks:
        return _nothing_started(records, progress)
    bad = [life for life in records.ranks if life.status != 0]
    absent = records.expected - len(records.ranks)
    if not bad and not absent:
        return _good_end(records, progress, at)
    first, why = first_to_fail(records)
    order = sorted(bad, key=lambda life: (life is not first, life.ended or life.last_sign))
    details = _details(order, first)
    if first is not None:
        sentence = f"{_named(first)} {why} {at}, the first of {len(bad)} ranks to fail"
        return _verdict(REFUSED if first.status == 1 else FAILED, sentence, details, progress)
    if any("SIGTERM" in life.signals for life in records.ranks):
        return _verdict(CANCELLED, f"ended by SIGTERM {at}: cancelled, or killed by the scheduler", details, progress)
    return _verdict(FAILED, f"{why}, {at}", details, progress)


def _unfit(records: AttemptRecords) -> str:
    named = [f"node {node}: {reason}" for node, reason in records.unfit[:SHOWN_RANKS]]
    more = len(records.unfit) - SHOWN_RANKS
    return "; ".join([*named, *([f"and {more} more nodes"] if more > 0 else [])])


def _nothing_started(records: AttemptRecords, progress: RunProgress) -> Verdict:
    if "SIGTERM" in records.signals:
        return _verdict(CANCELLED, "cancelled by SIGTERM before a rank had started", (), progress)
    if "SIGUSR1" in records.signals:
        return _verdict(STOPPED, "the job's time was nearly over before a rank had started", (), progress)
    return _verdict(FAILED, "no rank has started; see the output of the job for the reason", (), progress)


def _verdict(kind: str, sentence: str, details: tuple[str, ...], progress: RunProgress) -> Verdict:
    return Verdict(kind=kind, sentence=sentence, details=details, step=progress.step)


def _good_end(records: AttemptRecords, progress: RunProgress, at: str) -> Verdict:
    """Return the verdict on ranks that all ended well: at the end of the run, or when they were asked to stop."""
    received = {name for life in records.ranks for name in life.signals}
    if progress.steps and progress.step >= progress.steps:
        return _verdict(FINISHED, f"finished {at}", (), progress)
    if "SIGTERM" in records.signals:
        return _verdict(CANCELLED, f"stopped {at} by SIGTERM", (), progress)
    if "SIGUSR1" in received:
        return _verdict(STOPPED, f"stopped {at} by SIGUSR1, because the job's time was nearly over", (), progress)
    if received:
        return _verdict(CANCELLED, f"stopped {at} by {', '.join(sorted(received))}", (), progress)
    return _verdict(FINISHED, f"stopped by itself {at} (train.max_hours or train.patience)", (), progress)


def first_to_fail(records: AttemptRecords) -> tuple[RankLife | None, str]:
    """Return the rank that failed first, and how; or None and what is known if no rank can be named.

    The end of a rank that the launcher stopped, or that lost contact with another one, is only a consequence.
    """
    bad = sorted((life for life in records.ranks if life.status not in (0, None)), key=lambda life: life.ended or 0.0)
    # All ranks end with status 1 on a user's error; one of them prints it.
    for life in sorted((life for life in bad if life.status == 1), key=lambda life: not reason(life.tail)):
        return life, _how(life)
    for life in bad:
        if life.status != MAY_PASS and "SIGTERM" not in life.signals:
            return life, _how(life)
    silent = [life for life in records.ranks if life.status is None and "SIGTERM" not in life.signals]
    silent.sort(key=lambda life: life.last_sign)
    others = [life.ended or life.last_sign for life in records.ranks if life not in silent]
    last = max([*others, *(life.last_sign for life in silent)])
    if silent and (others or silent[0].last_sign < last - SILENT):
        return silent[0], "was lost with its node, or with everything that ran there, and left no exit status"
    if silent:
        return None, "all ranks ended at once: the job was killed, or its time was over"
    if len(records.ranks) < records.expected:
        there = {life.rank for life in records.ranks}
        absent = [str(rank) for rank in range(records.expected) if rank not in there]
        return None, f"ranks {', '.join(absent[:SHOWN_RANKS])} never started"
    if bad and all(life.status == MAY_PASS for life in bad):
        return None, "ranks lost contact with each other and none failed first: the network failed, or a rank hung"
    return None, "the launcher ended the ranks"


def _how(life: RankLife) -> str:
    status = life.status or 0
    if BY_SHELL < status <= BY_SHELL + signal.SIGRTMAX:
        status = BY_SHELL - status
    if status < 0:
        name = signal.Signals(-status).name
        return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    said = reason(life.tail)
    return f"ended with exit status {status}{f' ({said})' if said else ''}"


def reason(tail: Sequence[str]) -> str:
    """Return the most informative of the last lines that a rank printed: that of an error, if there is one."""
    for pattern in (r"Error: ", r"[\w.]*(Error|Exception|Interrupt)\b", r"\S"):
        for line in reversed(tail):
            if re.match(pattern, line):
                return line.strip().rstrip(".")
    return ""


def _named(life: RankLife) -> str:
    return f"rank {life.rank} on {life.node}"


def _details(order: Sequence[RankLife], first: RankLife | None) -> tuple[str, ...]:
    """Return lines on the ranks that failed, the first one first, and the last lines that it printed."""
    lines = []
    began = order[0].ended or order[0].last_sign if order else 0.0
    for life in order[:SHOWN_RANKS]:
        if life.ended is None:
            seen = time.strftime("%H:%M:%S", time.localtime(life.last_sign))
            lines.append(f"{_named(life)}: no exit status; its node was last seen at {seen}")
            continue
        when = time.strftime("%H:%M:%S", time.localtime(life.ended))
        after = f", {life.ended - began:+.1f} s" if life is not order[0] else ""
        received = f", received {', '.join(dict.fromkeys(life.signals))}" if life.signals else ""
        lines.append(f"{_named(life)}, {when}{after}: {_how(life)}{received}")
    if len(order) > SHOWN_RANKS:
        lines.append(f"and {len(order) - SHOWN_RANKS} more ranks")
    if first is not None and first.tail:
        lines += [f"last output of rank {first.rank}:", *(f"    {line}" for line in first.tail[-SHOWN_LINES:])]
    return tuple(lines)


def job_of(folder: Path) -> str:
    """Return the name of an attempt's job; empty if it is not known."""
    try:
        document = read_json(folder / JOB_NAME, shape=dict[str, Any])
    except ConfigError:
        return ""
    return f"job {document['job']}" if document.get("job") else ""


def job_summary(attempts: Sequence[tuple[Path, Verdict]], retries: int) -> list[str]:
    """Return the lines that `hydrazero postmortem` prints: every attempt, and why the job is not restarted if so."""
    lines = []
    for number, (folder, verdict) in enumerate(attempts, start=1):
        job = job_of(folder)
        lines.append(f"attempt {number}{f' ({job})' if job else ''}: {verdict.sentence}")
        lines += [f"    {line}" for line in verdict.details]
    _, why_not = should_restart([verdict for _, verdict in attempts], retries)
    return [*lines, f"the job should not be restarted: {why_not}"] if why_not else lines


def job_status(verdicts: Sequence[Verdict], retries: int) -> int:
    """Return the exit status of `hydrazero postmortem`: 0, RESTART or GIVE_UP."""
    restart, _ = should_restart(verdicts, retries)
    if restart:
        return RESTART
    return GIVE_UP if verdicts[-1].kind in (REFUSED, FAILED, STOPPED) else 0
