"""Kill a run with SIGKILL at random moments, resume it each time, and compare the end with a run that was never killed.

    python tests/ranks/torture.py --kills 20 --seed 0      (or `make torture`)

The run has two ranks under ZeRO 1, an average of the weights, validation, checkpoints and balancing by gradient norms.
Either all ranks are killed, or one of them; then the other must end by itself within a minute. The exit status is 1 if
a loss, a weight, a moment of the optimizer or the average differs in a single bit.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rank_processes import PROGRAMS, Rank, started_ranks
from run_files import write_small_run
from sources import make_shards, metals, molecules

from hydrazero.trainer.checkpoint.folders import latest_checkpoint
from hydrazero.trainer.checkpoint.save_load import read_state
from hydrazero.trainer.checkpoint.zero_files import ZeroFiles
from hydrazero.trainer.engine.partition import partition_in
from hydrazero.trainer.engine.weight_average import AVERAGE_NAME
from hydrazero.trainer.ranks.exit_status import MAY_PASS
from hydrazero.trainer.ranks.launcher import GRACE
from hydrazero.trainer.records.run_files import RUN_NAME, read_metrics

RANKS = 2
STEPS_PER_KILL = 20
"""Steps of the run per kill, more than a start can complete: it is killed within eight steps or shortly after."""
MINUTE = 60.0
AIMS = ("any moment", "step", "evaluation", "checkpoint", "start")
CLOCKED = ("structures_per_s", "atoms_per_s", "steps_per_s", "data_wait_share", "memory_mb", "trained_seconds")
"""Keys of the metrics that depend on the clock or on when a process started."""


def make_data(root: Path) -> Path:
    """Write the shards of two small tasks."""
    make_shards(root, "molecules", molecules(120))
    make_shards(root, "metals", metals(40))
    return root


def write_run(folder: Path, data: Path, steps: int) -> Path:
    """Write the run file of a run in `folder`/run."""
    every = {"evaluate_every": 7, "checkpoint_every": 5, "log_every": 2}
    return write_small_run(folder, data, train={"steps": steps, "keep_checkpoints": 2, "average": 0.9, **every})


@dataclass
class RunStart:
    """The ranks of one start of a run, until they end by themselves or are killed."""

    run_file: Path
    notes: list[Path] = field(default_factory=list)
    processes: list[Rank] = field(default_factory=list)
    _exits: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> RunStart:
        run_dir = self.run_file.parent / "run"
        resume = ["--resume"] if (run_dir / RUN_NAME).exists() else []
        self.notes = [self.run_file.with_name(f"doing-{rank}") for rank in range(RANKS)]
        for note in self.notes:
            note.unlink(missing_ok=True)
        commands = [[PROGRAMS / "torture_rank.py", note, self.run_file, *resume] for note in self.notes]
        output = self.run_file.with_name("output.txt")
        self.processes = self._exits.enter_context(started_ranks(commands, output))
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def doing(self, rank: int) -> tuple[int, str]:
        """Return the number of steps that a rank has begun since this start, and its current or last activity."""
        words = self.notes[rank].read_text().split() if self.notes[rank].exists() else []
        return (int(words[0]), words[1]) if len(words) == 2 else (0, "start")

    def output(self) -> str:
        """Return the end of the output of the ranks of all starts."""
        return self.run_file.with_name("output.txt").read_text()[-3000:]

    def ended(self) -> bool:
        """Return whether a rank has ended."""
        return any(process.poll() is not None for process in self.processes)

    def finish(self) -> None:
        """Wait until all ranks have ended; raise RuntimeError if one failed."""
        for process in self.processes:
            if (status := process.wait()) != 0:
                raise RuntimeError(f"a rank ended with {status}: {self.output()}")

    def wait_for(self, rank: int, aim: str, generator: random.Random) -> None:
        """Wait for the moment of a kill: during the activity `aim` of a rank, after up to eight steps."""
        if aim == "start":
            end = time.monotonic() + generator.uniform(0.0, 10.0)
            # Where starts are quick, the kill falls into the first step: a short run would be complete by then.
            while time.monotonic() < end and self.doing(rank)[0] == 0 and not self.ended():
                time.sleep(0.01)
            return
        steps = generator.randint(1, 8)
        while not self.ended():
            begun, doing = self.doing(rank)
            if begun >= steps and aim in (doing, "any moment"):
                break
            time.sleep(0.0005)
        # The activity takes some hundredths of a second, so that the kill falls anywhere in it, or just after it.
        time.sleep(generator.uniform(0.0, 0.15 if aim == "any moment" else 0.06))

    def kill(self, ranks: list[int]) -> float:
        """Kill ranks and wait for the others to end; return the seconds that this took.

        Ranks that are not connected yet cannot notice that one is missing. Launchers kill them, and so does this.
        """
        began = time.monotonic()
        for rank in ranks:
            self.processes[rank].send_signal(signal.SIGKILL)
        together = all(self.doing(rank)[1] != "start" for rank in range(RANKS))
        for rank, process in enumerate(self.processes):
            try:
                status = process.wait(timeout=MINUTE if together else GRACE)
            except TimeoutError as error:
                if together:
                    raise RuntimeError(f"rank {rank} still runs a minute after rank {ranks[0]} was killed") from error
                process.kill()
                status = process.wait()
            if together and rank not in ranks and status != MAY_PASS:
                raise RuntimeError(f"rank {rank} ended with {status} after rank {ranks[0]} was killed")
        return time.monotonic() - began


def train(run_file: Path) -> None:
    """Train to the end, from the beginning or from the last checkpoint."""
    with RunStart(run_file) as start:
        start.finish()


def kill_once(run_file: Path, aim: str, one: bool, generator: random.Random) -> tuple[str, float]:
    """Start or resume a run and kill it; return its activity, and the seconds until the surviving ranks ended.

    Raises RuntimeError if the run ends before the kill, or if a surviving rank does not end.
    """
    with RunStart(run_file) as start:
        rank = generator.randrange(RANKS)
        start.wait_for(rank, aim, generator)
        if start.ended():
            raise RuntimeError(f"the run ended by itself: {start.output()}")
        seconds = start.kill([rank] if one else list(range(RANKS)))
        return start.doing(rank)[1], seconds


def differences(run: Path, whole: Path) -> list[str]:
    """Return the names of everything that differs in any bit between the ends of two runs."""
    found = []
    rows, expected = (comparable(read_metrics(each)) for each in (run, whole))
    for kind in ("train", "evaluation", "balance"):
        if rows[kind] != expected[kind]:
            found.append(f"rows of kind '{kind}'")
    if not all(expected.values()):
        found.append("metrics of the complete run, which lack a kind")
    tensors, wanted = (all_tensors(latest_checkpoint(each)) for each in (run, whole))
    if set(tensors) != set(wanted):
        found.append("names of tensors")
    else:
        found += [name for name, value in wanted.items() if not torch.equal(tensors[name], value)]
    average, expected_average = (latest_checkpoint(each) / AVERAGE_NAME for each in (run, whole))
    if average.read_bytes() != expected_average.read_bytes():
        found.append("average of the weights")
    return found


def comparable(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the metrics by kind, without keys that depend on the clock."""
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "evaluation": [], "balance": []}
    for row in rows:
        kinds[row["kind"]].append({key: value for key, value in row.items() if key not in CLOCKED})
    return kinds


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights and moments in a checkpoint."""
    layout = partition_in(read_state(folder)["layout"])
    saved = ZeroFiles(folder, layout)
    keys = (None, "exp_avg", "exp_avg_sq")
    return {
        f"{name} {key or 'weight'}": saved.read(name, 0, place.size, key)
        for name, place in layout.places.items()
        for key in keys
    }


def torture(root: Path, kills: int, seed: int) -> int:
    """Run the complete test and print the counts; return the exit status."""
    generator, steps = random.Random(seed), STEPS_PER_KILL * kills
    data = make_data(root / "data")
    whole, run_file = (write_run(root / name, data, steps) for name in ("whole", "killed"))
    print(f"a run of {steps} steps that is never killed ...", flush=True)
    train(whole)
    tally: Counter[tuple[str, str]] = Counter()
    slowest = 0.0
    for number in range(1, kills + 1):
        one = bool(generator.randrange(2))
        doing, seconds = kill_once(run_file, AIMS[number % len(AIMS)], one, generator)
        who = "one rank" if one else "all ranks"
        tally[doing, who] += 1
        if one and doing != "start":
            slowest = max(slowest, seconds)
        print(f"kill {number}: {who}, in: {doing}; ended {seconds:.1f} s later", flush=True)
    train(run_file)
    print(f"\n{'killed while in':20s}{'all ranks':>12s}{'one rank':>12s}")
    for doing in ("start", "loading", "step", "evaluation", "checkpoint", "between"):
        print(f"{doing:20s}{tally[doing, 'all ranks']:12d}{tally[doing, 'one rank']:12d}")
    print(f"the slowest survivor ended {slowest:.1f} s after the other was killed")
    found = differences(run_file.parent / "run", whole.parent / "run")
    print(f"DIFFERENT: {', '.join(found)}" if found else "same losses, weights, moments and average, bit for bit")
    return int(bool(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(torture(Path(folder), options.kills, options.seed))


if __name__ == "__main__":
    main()
