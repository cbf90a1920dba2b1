"""How the tries of a job ended: which rank failed first and why, and whether the job should go on."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydrazero.launch.node.records import (
    ATTEMPTS,
    BY_SHELL,
    JOB_NAME,
    LAUNCH,
    SIGN_EVERY,
    VERDICT_NAME,
    RankLife,
    TryRecords,
    read_try,
)
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.folders import checkpoints, step_of
from hydrazero.trainer.ranks.exit_status import MAY_PASS
from hydrazero.trainer.records.run_files import RUN_NAME, read_json, write_json

FINISHED, STOPPED, CANCELLED, FAILED, REFUSED = "finished", "stopped", "cancelled", "failed", "refused"
"""The run is complete or has stopped by itself; the job's time was over; somebody ended it; something broke; what
would happen again."""
GOES_ON, OVER = MAY_PASS, 1
"""Exit statuses of `hydrazero postmortem`, beside 0."""
SHOWN_RANKS = 8
SHOWN_LINES = 12
SILENT = 3 * SIGN_EVERY
"""Seconds without a sign of life by which a node was lost before the others."""
LOOK_EVERY = 1.0
"""Seconds between two looks at what ranks have noted."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    step: int
    """Of the last complete checkpoint."""
    steps: int
    """0 if the run has not started."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a try ended."""

    kind: str
    sentence: str
    details: tuple[str, ...]
    """Lines: ranks in the order in which they ended, and what the first printed last."""
    step: int
    """Of the last checkpoint at its end."""


def progress_of(run_dir: Path) -> Progress:
    """Read how far a run is."""
    found = checkpoints(run_dir)
    step = step_of(found[-1]) if found else 0
    if not (run_dir / RUN_NAME).exists():
        return Progress(step=step, steps=0)
    record = read_json(run_dir / RUN_NAME)
    resumes = record.get("resumes") or [{"steps": record["train"]["steps"]}]
    return Progress(step=step, steps=int(resumes[-1]["steps"]))


def judge_tries(run_dir: Path, wait: float = 0.0) -> list[tuple[Path, Verdict]]:
    """Judge the tries that have yet to be judged; returns all of them, the last one last.

    Ranks of the last one that still live are waited for, `wait` seconds at most. Raises ConfigError if the run was
    never launched as a job.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"there is no folder {run_dir}; name that of a run.")
    folders = sorted((run_dir / LAUNCH).glob(ATTEMPTS))
    if not folders:
        raise ConfigError(f"{run_dir} holds no tries of a job ({LAUNCH}/{ATTEMPTS}); is it a run that was launched?")
    verdicts = []
    for folder in folders:
        kept = folder / VERDICT_NAME
        if kept.is_file():
            table = read_json(kept)
            verdict = Verdict(**{**table, "details": tuple(table["details"])})
        else:
            if folder == folders[-1]:
                wait_for_ends(folder, wait)
            verdict = judge(read_try(folder), progress_of(run_dir))
            write_json(kept, asdict(verdict))
        verdicts.append((folder, verdict))
    return verdicts


def wait_for_ends(folder: Path, seconds: float) -> None:
    """Return when every rank of a try has noted its end or its node has fallen silent, or the seconds are over.

    A launcher may end before ranks on other hosts have: what it ran there still saves a checkpoint.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        alive_since = time.time() - SILENT
        if all(life.ended is not None or life.last_sign < alive_since for life in read_try(folder).ranks):
            return
        time.sleep(min(LOOK_EVERY, max(until - time.monotonic(), 0.0)))


def goes_on(verdicts: Sequence[Verdict], retries: int) -> tuple[bool, str]:
    """Whether a job should be started again after its last try, and why not if it should not."""
    last, before = verdicts[-1], verdicts[-2].step if len(verdicts) > 1 else 0
    if last.kind == STOPPED:
        further = last.step > before
        return further, "" if further else "its time was over before it had got any further; ask for more hours."
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
    return False, f"{failed}once the cause is mended hydrazero launch --resume starts it again."


def judge(records: TryRecords, progress: Progress) -> Verdict:
    """Say how a try ended; one whose job was told SIGTERM has not failed, whatever came of it."""
    verdict = _judged(records, progress)
    if "SIGTERM" in records.told and verdict.kind in (FAILED, STOPPED):
        return replace(verdict, kind=CANCELLED, sentence=f"cancelled by SIGTERM: {verdict.sentence}")
    return verdict


def _judged(records: TryRecords, progress: Progress) -> Verdict:
    at = f"at step {progress.step} of {progress.steps}" if progress.steps else "before its first step"
    if records.unfit:
        return _verdict(FAILED, f"no rank has started, since nodes are not fit ({_unfit(records)})", (), progress)
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
        sentence = f"{_named(first)} {why} {at}, the first of {len(bad)} to end badly"
        return _verdict(REFUSED if first.status == 1 else FAILED, sentence, details, progress)
    if any("SIGTERM" in life.told for life in records.ranks):
        return _verdict(CANCELLED, f"ended by SIGTERM {at}: cancelled, or killed by the scheduler", details, progress)
    return _verdict(FAILED, f"{why}, {at}", details, progress)


def _unfit(records: TryRecords) -> str:
    named = [f"node {node}: {reason}" for node, reason in records.unfit[:SHOWN_RANKS]]
    more = len(records.unfit) - SHOWN_RANKS
    return "; ".join([*named, *([f"and {more} more nodes"] if more > 0 else [])])


def _nothing_started(records: TryRecords, progress: Progress) -> Verdict:
    if "SIGTERM" in records.told:
        return _verdict(CANCELLED, "cancelled by SIGTERM before a rank had started", (), progress)
    if "SIGUSR1" in records.told:
        return _verdict(STOPPED, "its time was nearly over before a rank had started", (), progress)
    return _verdict(FAILED, "no rank has started; what the job has printed says why", (), progress)


def _verdict(kind: str, sentence: str, details: tuple[str, ...], progress: Progress) -> Verdict:
    return Verdict(kind=kind, sentence=sentence, details=details, step=progress.step)


def _good_end(records: TryRecords, progress: Progress, at: str) -> Verdict:
    """All ranks have ended well: at the end of the run, or where they were asked to."""
    told = {name for life in records.ranks for name in life.told}
    if progress.steps and progress.step >= progress.steps:
        return _verdict(FINISHED, f"finished {at}", (), progress)
    if "SIGTERM" in records.told:
        return _verdict(CANCELLED, f"stopped {at} by SIGTERM", (), progress)
    if "SIGUSR1" in told:
        return _verdict(STOPPED, f"stopped {at} by SIGUSR1, since the job's time was nearly over", (), progress)
    if told:
        return _verdict(CANCELLED, f"stopped {at} by {', '.join(sorted(told))}", (), progress)
    return _verdict(FINISHED, f"stopped by itself {at} (train.max_hours or train.patience)", (), progress)


def first_to_fail(records: TryRecords) -> tuple[RankLife | None, str]:
    """Return the rank that was the first to fail and how it did; None, and what is known, if none stands out.

    A rank that the launcher ended, or that had lost another one, is a consequence.
    """
    bad = sorted((life for life in records.ranks if life.status not in (0, None)), key=lambda life: life.ended or 0.0)
    # All ranks know of an error that is meant for users, and one of them says it.
    for life in sorted((life for life in bad if life.status == 1), key=lambda life: not reason(life.tail)):
        return life, _how(life)
    for life in bad:
        if life.status != MAY_PASS and "SIGTERM" not in life.told:
            return life, _how(life)
    silent = [life for life in records.ranks if life.status is None and "SIGTERM" not in life.told]
    silent.sort(key=lambda life: life.last_sign)
    others = [life.ended or life.last_sign for life in records.ranks if life not in silent]
    last = max([*others, *(life.last_sign for life in silent)])
    if silent and (others or silent[0].last_sign < last - SILENT):
        return silent[0], "was lost with its node, or with all that ran there, and left no exit status"
    if silent:
        return None, "all ranks were ended at once: the job was killed, or had no time left"
    if len(records.ranks) < records.expected:
        there = {life.rank for life in records.ranks}
        absent = [str(rank) for rank in range(records.expected) if rank not in there]
        return None, f"ranks {', '.join(absent[:SHOWN_RANKS])} have never started"
    if bad and all(life.status == MAY_PASS for life in bad):
        return None, "ranks have lost each other, though none of them failed first: the network, or a rank that hung"
    return None, "ranks were ended by their launcher"


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
    """Return the line of a rank's last ones that says most: an error's."""
    for pattern in (r"Error: ", r"[\w.]*(Error|Exception|Interrupt)\b", r"\S"):
        for line in reversed(tail):
            if re.match(pattern, line):
                return line.strip().rstrip(".")
    return ""


def _named(life: RankLife) -> str:
    return f"rank {life.rank} on {life.node}"


def _details(order: Sequence[RankLife], first: RankLife | None) -> tuple[str, ...]:
    """Lines on ranks that ended badly, the first one first, and the last lines that the first printed."""
    lines = []
    began = order[0].ended or order[0].last_sign if order else 0.0
    for life in order[:SHOWN_RANKS]:
        if life.ended is None:
            seen = time.strftime("%H:%M:%S", time.localtime(life.last_sign))
            lines.append(f"{_named(life)}: no exit status; its node was last seen at {seen}")
            continue
        when = time.strftime("%H:%M:%S", time.localtime(life.ended))
        after = f", {life.ended - began:+.1f} s" if life is not order[0] else ""
        told = f", told {', '.join(dict.fromkeys(life.told))}" if life.told else ""
        lines.append(f"{_named(life)}, {when}{after}: {_how(life)}{told}")
    if len(order) > SHOWN_RANKS:
        lines.append(f"and {len(order) - SHOWN_RANKS} more ranks")
    if first is not None and first.tail:
        lines += [f"what rank {first.rank} printed last:", *(f"    {line}" for line in first.tail[-SHOWN_LINES:])]
    return tuple(lines)


def job_of(folder: Path) -> str:
    """Name the job of a try, empty if it is not known."""
    try:
        document: Any = json.loads((folder / JOB_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return f"job {document['job']}" if document.get("job") else ""
