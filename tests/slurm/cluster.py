"""A Slurm of two nodes on this host, in a temporary folder: munged, slurmctld, and a slurmd for each node."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "scontrol": "slurm-client",
}
"""Program -> Debian package."""
NODES = ("n1", "n2")
CONFIGURATION = """\
ClusterName=hydrazero
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that goes back into the queue waits until the old credentials have expired: two minutes if not told otherwise.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
# The scheduler looks for work every second, so that a job is back from the queue soon.
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
ReturnToService=2
SlurmdTimeout=15
KillWait=10
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=500 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=500 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Say why there can be no cluster here, None if there can."""
    packages = {package for program, package in PROGRAMS.items() if shutil.which(program, path=search_path()) is None}
    if packages:
        return f"Slurm is not installed here; apt-get install {' '.join(sorted(packages))}."
    if os.geteuid() != 0:
        return "Slurm's daemons need root here."
    return None


def search_path() -> str:
    """Where daemons lie, too."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """The cluster between its start and its end; nothing that it has started lives on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(root / "slurm.conf")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(root=self.root, host=host, nodes=NODES, ports=_free_ports(3))
        (self.root / "slurm.conf").write_text(text)
        for folder in ("state", *(f"spool-{node}" for node in NODES)):
            (self.root / folder).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = [f"--{name}={self.root}/munge.{end}" for name, end in (("socket", "socket"), ("key-file", "key"))]
        places += [f"--{name}={self.root}/munge.{end}" for name, end in (("pid-file", "pid"), ("log-file", "log"))]
        self._run("munged", "munged", "--foreground", "--force", f"--seed-file={self.root}/munge.seed", *places)
        self._run("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.ask("sinfo", "--noheader", "--format=%T").split() == ["idle"], "idle nodes", 60)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._run(node, "slurmd", "-D", "-N", node)

    def _run(self, name: str, *command: str) -> None:
        with open(self.root / f"{name}.out", "ab") as output:
            # Sessions of their own, so that Ctrl-C ends the test first, and the test ends them.
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def lose_node(self, node: str) -> None:
        """End a node as if it had lost its power: its daemon, the steps on it and all that they have started."""
        victims = [self.processes.pop(node).pid, *self.of_node(node)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def of_node(self, node: str) -> list[int]:
        """Processes of the jobs on a node."""
        return [pid for pid in self.processes_left() if f"SLURMD_NODENAME={node}" in _variables(pid)]

    def processes_left(self) -> list[int]:
        """All processes that carry this cluster's configuration in their environment."""
        mine = f"SLURM_CONF={self.root}/slurm.conf"
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if pid != os.getpid() and mine in _variables(pid)]

    def ask(self, *command: str) -> str:
        """Return what a command of Slurm prints; empty if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, holds: Callable[[], bool], what: str, seconds: float) -> None:
        """Return when something holds; raises TimeoutError, with what the daemons have said, if it does not."""
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                raise TimeoutError(f"no {what} after {seconds:g} s\n{self.logs()}")
            time.sleep(0.3)

    def logs(self) -> str:
        """Return the ends of all logs."""
        paths = [*sorted(self.root.glob("*.log")), *sorted(self.root.glob("*.out"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in paths)

    def __exit__(self, *error: object) -> None:
        self.ask("scancel", "--full", "--signal=KILL", "--state=RUNNING", "--user=root")
        for process in reversed(self.processes.values()):
            process.terminate()
        until = time.monotonic() + 10
        while time.monotonic() < until and any(process.poll() is None for process in self.processes.values()):
            time.sleep(0.1)
        for pid in self.processes_left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes.values():
            process.kill()
            process.wait()


def _variables(pid: int) -> set[str]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
    except OSError:
        return set()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
