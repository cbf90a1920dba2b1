"""`make slurm-test`: jobs that `hydrazero launch` writes, on a Slurm of two nodes that is started on this host.

A job trains on two nodes with one rank each. It receives the signal for its time limit, stops with a checkpoint, is put
back into the queue and continues. One of its ranks is killed; the post-mortem names it, and the job is put back once
more. It ends with the losses, weights and moments of an uninterrupted run, bit for bit. Another job loses a node; the
post-mortem of the next attempt reports it, and the job succeeds. Jobs that are cancelled before or during training are
never put back and leave the nodes clean; during training they write a checkpoint. A node that hangs is named. The exit
status is 0 if all this holds, 1 if not, and 77, with a sentence, if Slurm is not installed or the user is not root.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "ranks"), str(Path(__file__).parent)]

from cluster import Cluster, missing  # noqa: E402
from torture import differences, make_data, write_run  # noqa: E402

from hydrazero.trainer.checkpoint.folders import checkpoints, step_of  # noqa: E402

SKIPPED = 77
BIN = Path(sys.executable).parent
STEPS, MANY = 40, 100000
CHANGES = ("train.evaluate_every=20", "train.checkpoint_every=5", "data.workers=0")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
ENOUGH = 200.0
"""Time limit of each step in seconds, for a busy machine; on an idle one, a tenth is enough."""


class Failed(Exception):
    """An expectation that does not hold."""


def main() -> int:
    """Run all tests; return the exit status."""
    if (why := missing()) is not None:
        print(f"skipped: {why}")
        return SKIPPED
    began = time.monotonic()
    # After Ctrl-C or a kill, everything that was started is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="hydrazero-slurm-") as folder:
        root = Path(folder)
        data = make_data(root / "data")
        site = write_site(root)
        whole = write_run(root / "whole", data, STEPS)
        say("a run that nothing interrupts, without Slurm")
        command = [str(BIN / "hydrazero"), "train", str(whole), "--ranks", "2", *sets()]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        with Cluster(root) as cluster:
            say(f"Slurm {cluster.ask('sinfo', '--version').split()[-1]} is up with 2 nodes")
            try:
                # sbatch and the script must handle the name of this folder correctly.
                first = write_run(root / "first job, 100%", data, STEPS)
                time_over_and_rank_killed(cluster, first, site, whole.parent / "run")
                node_lost(cluster, write_run(root / "second", data, STEPS), site, whole.parent / "run")
                cancelled(cluster, write_run(root / "third", data, MANY), site)
                hung = write_site(root / "hung", f"health = '{hanging_on_n2(root)}'")
                cancelled_in_the_check(cluster, write_run(root / "fourth", data, STEPS), hung)
                hung.write_text(hung.read_text().replace("[job]\n", "[job]\nretries = 0\ncheck_within = 5\n", 1))
                node_hangs(cluster, write_run(root / "fifth", data, STEPS), hung)
            except (Failed, TimeoutError) as error:
                print(f"FAILED: {error}")
                return 1
        left = cluster.processes_left()
        if left:
            print(f"FAILED: processes {left} live on")
            return 1
    say(f"all as it should be, in {time.monotonic() - began:.0f} s; nothing is left")
    return 0


def say(text: str) -> None:
    print(text, flush=True)


def last_postmortem(output: str) -> str:
    return f"attempt 1{output.rsplit('attempt 1', 1)[-1]}"


def sets() -> list[str]:
    return [word for change in CHANGES for word in ("--set", change)]


def hanging_on_n2(root: Path) -> Path:
    """Write a command that ends on all nodes except n2."""
    path = root / "health"
    path.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" = n1 ] || exec sleep 600\n')
    path.chmod(0o755)
    return path


def write_site(root: Path, *job: str) -> Path:
    """Write the packaged site file for CPU cores and with a disk on each node; `job` are more lines of [job]."""
    root.mkdir(exist_ok=True)
    text = (ROOT / "launch" / "sites" / "slurm.toml").read_text()
    text = text.replace('kind = "gpu"', 'kind = "cpu"')
    text = text.replace("[job]\n", "\n".join(["[job]", *job, ""]), 1)
    text = re.sub(r"^node_local = .*\n", "", text, flags=re.MULTILINE)
    text = text.replace("[files]\n", f'[files]\nnode_local = "{root}/disk"\n')
    path = root / "site.toml"
    path.write_text(text)
    return path


class RunningJob:
    """A job of the cluster, and its run."""

    def __init__(self, cluster: Cluster, run_file: Path, site: Path) -> None:
        self.cluster, self.run = cluster, run_file.parent / "run"
        command = [str(BIN / "hydrazero"), "launch", str(run_file), "--site", str(site), "--nodes", "2"]
        command += ["--ranks-per-node", "1", "--hours", "1", "--submit", *sets()]
        done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"{done.stdout}{done.stderr}")
        self.number = done.stdout.split(":")[0].removeprefix("job ").strip()

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds; raise Failed with the output of the job if it never does."""
        try:
            self.cluster.wait(holds, what, ENOUGH)
        except TimeoutError as error:
            raise Failed(f"{error}\n--- the job\n{self.output()}") from error

    def output(self) -> str:
        """Return the output of the job."""
        path = self.run / "launch" / f"job-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def restarts(self) -> int:
        """Return how many times the job has been put back into the queue."""
        return int(self.cluster.job(self.number).get("Restarts", "0"))

    def runs(self, restarts: int) -> bool:
        """Return whether the job is running after this number of restarts."""
        return self.restarts() == restarts and self.cluster.job(self.number).get("JobState") == "RUNNING"

    def step(self) -> int:
        """Return the step of the last checkpoint."""
        found = checkpoints(self.run)
        return step_of(found[-1]) if found else 0

    def trainer(self, node: str) -> int:
        """Return the process number of the rank on a node."""
        for pid in self.cluster.of_node(node):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"hydrazero.trainer.train" in words and b"hydrazero.launch.node.rank" not in words:
                return pid
        raise Failed(f"no rank on {node}")

    def expect(self, pattern: str) -> None:
        """Raise Failed unless the output of the job matches a pattern."""
        if not re.search(pattern, self.output()):
            raise Failed(f"the job does not say '{pattern}':\n{self.output()}")

    def end(self) -> str:
        """Wait for the end of the job; return its state in Slurm."""
        self.wait(lambda: self.cluster.job(self.number).get("JobState") in OVER, "end of the job")
        return self.cluster.job(self.number)["JobState"]

    def finish(self, whole: Path) -> None:
        """Wait until the job has succeeded, and compare its run with an uninterrupted one."""
        if (state := self.end()) != "COMPLETED":
            raise Failed(f"the job ended as {state}:\n{self.output()}")
        if found := differences(self.run, whole):
            raise Failed(f"the run differs from the uninterrupted one in {', '.join(found)}")


def time_over_and_rank_killed(cluster: Cluster, run_file: Path, site: Path, whole: Path) -> None:
    job = RunningJob(cluster, run_file, site)
    job.wait(lambda: job.step() >= 5, "checkpoint")
    say(f"job {job.number} trains on 2 nodes; its time is over")
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    job.wait(lambda: job.restarts() == 1, "restart after SIGUSR1")
    stopped = job.step()
    job.expect(rf"stopped at step {stopped} of {STEPS} by SIGUSR1")
    job.wait(lambda: job.runs(1) and job.step() >= stopped + 5, "checkpoint after the restart")
    say(f"stopped at step {stopped}, back from the queue, and on; the rank on n2 is killed")
    os.kill(job.trainer("n2"), signal.SIGKILL)
    job.wait(lambda: job.restarts() == 2, "restart after the kill")
    job.expect(rf"rank 1 on n2 was killed by SIGKILL \(out of memory\?\) at step \d+ of {STEPS}, the first of 2")
    job.expect(r"rank 0 on n1, [\d:]+, \+\d+\.\d s: ended with exit status 75 \(Error: rank 0 has lost another rank")
    job.finish(whole)
    if list((cluster.root / "disk").glob("*")):
        raise Failed("copies of the shards were left on the nodes")
    say("named by the post-mortem; back from the queue; the same losses, weights and moments, bit for bit")
    say(last_postmortem(job.output()))


def node_lost(cluster: Cluster, run_file: Path, site: Path, whole: Path) -> None:
    job = RunningJob(cluster, run_file, site)
    job.wait(lambda: job.step() >= 5, "checkpoint")
    say(f"job {job.number} trains on 2 nodes; n2 is lost")
    cluster.lose_node("n2")
    job.wait(lambda: job.restarts() == 1, "restart after the loss")
    cluster.start_node("n2")
    job.finish(whole)
    job.expect(r"rank 1 on n2 was lost with its node, or with everything that ran there")
    say("named by the post-mortem of the next attempt; the same losses, weights and moments, bit for bit")
    say(last_postmortem(job.output()))


def cancelled(cluster: Cluster, run_file: Path, site: Path) -> None:
    job = RunningJob(cluster, run_file, site)
    job.wait(lambda: job.step() >= 5, "checkpoint")
    say(f"job {job.number} trains on 2 nodes; its script is sent SIGTERM")
    cluster.ask("scancel", "--batch", "--signal=TERM", job.number)
    over(job, "COMPLETED", rf"stopped at step \d+ of {MANY} by SIGTERM\n")


def cancelled_in_the_check(cluster: Cluster, run_file: Path, site: Path) -> None:
    job = RunningJob(cluster, run_file, site)
    job.wait(lambda: any(job.run.glob("launch/attempt-*/n1.jsonl")), "answer of n1")
    say(f"job {job.number} is cancelled while n2 is checked")
    cluster.ask("scancel", job.number)
    over(job, "CANCELLED", "cancelled by SIGTERM before a rank had started")


def over(job: RunningJob, expected: str, pattern: str) -> None:
    """Raise Failed unless a cancelled job ends in a state, with a line of the post-mortem, and is not restarted."""
    if (state := job.end()) != expected:
        raise Failed(f"the job ended as {state}:\n{job.output()}")
    job.wait(lambda: re.search(pattern, job.output()) is not None, f"'{pattern}' of the post-mortem")
    if job.restarts() or "put back" in job.output():
        raise Failed(f"the job that was cancelled was put back into the queue:\n{job.output()}")
    job.wait(lambda: not list(job.run.parent.parent.glob("**/disk/*")), "clean disks")
    say(last_postmortem(job.output()))


def node_hangs(cluster: Cluster, run_file: Path, site: Path) -> None:
    job = RunningJob(cluster, run_file, site)
    say(f"the check of n2 hangs in job {job.number}")
    if (state := job.end()) != "FAILED":
        raise Failed(f"the job ended as {state}:\n{job.output()}")
    job.expect(r"nodes failed the check \(node n2: '.*health' has not ended within 5 s\)")
    say(last_postmortem(job.output()))


if __name__ == "__main__":
    sys.exit(main())
