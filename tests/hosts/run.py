"""`make hosts-test`: a run on two hosts, which are network namespaces with ssh between them; one of them is lost.

`hydrazero launch --site local --hostfile` starts the run through the deepspeed launcher. After the loss of one host,
the other must stop within a minute with the reason, and the post-mortem must name the lost host. A host that does not
respond is rejected before anything is started. The exit status is 0 if all this holds, 1 if not, and 77, with a
sentence, if tools or rights are missing.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "ranks"), str(Path(__file__).parent)]

from network import INTERFACE, PREFIX, Network, missing  # noqa: E402
from torture import make_data, write_run  # noqa: E402

from hydrazero.trainer.checkpoint.folders import checkpoints  # noqa: E402

SKIPPED = 77
BIN = Path(sys.executable).parent
HOSTS = ("alpha", "beta")
MINUTE = 60.0
ENOUGH = 200.0
"""Seconds until the first checkpoint, on a busy machine."""
CHANGES = ("train.timeout_minutes=0.25", "train.evaluate_every=100000", "train.checkpoint_every=5", "data.workers=0")


class Failed(Exception):
    """An expectation that does not hold."""


def main() -> int:
    """Run all tests; return the exit status."""
    if (why := missing()) is not None:
        print(f"skipped: {why}")
        return SKIPPED
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="hydrazero-hosts-") as folder:
        root = Path(folder)
        run_file = write_run(root / "a run", make_data(root / "data"), 100000)
        with Network(root, HOSTS) as network:
            print(f"two hosts, {' and '.join(network.addresses.values())}, let each other in by ssh", flush=True)
            try:
                unknown_host(network, run_file)
                host_vanishes(network, run_file)
            except Failed as error:
                print(f"FAILED: {error}")
                return 1
    print(f"all as it should be, in {time.monotonic() - began:.0f} s; nothing is left")
    return 0


def launch(network: Network, run_file: Path, hosts: list[str], *options: str) -> subprocess.Popen[str]:
    """Launch a run from the first host, with one rank on each of several hosts."""
    hostfile = run_file.with_name("hosts")
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))
    command = [str(BIN / "hydrazero"), "launch", str(run_file), "--site", "local", "--hostfile", str(hostfile)]
    command += ["--nodes", "2", "--ranks-per-node", "1", "--submit", *options]
    command += [word for change in CHANGES for word in ("--set", change)]
    # All of it runs inside the namespace of the host, whose name is set first.
    return subprocess.Popen(
        network.inside(HOSTS[0], "sh", "-c", f'hostname {HOSTS[0]}; exec "$@"', "sh", *command),
        env={**network.environment, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def refused(network: Network, run_file: Path, hosts: list[str], host: str, *options: str) -> None:
    """Raise Failed unless a launch is rejected with one sentence because a host does not respond."""
    process = launch(network, run_file, hosts, *options)
    output, _ = process.communicate(timeout=ENOUGH)
    said = rf"Error: not reached by ssh .*{re.escape(host)} \(.*\).*\n"
    if process.returncode != 1 or not re.fullmatch(said, output):
        raise Failed(f"status {process.returncode} for a host that does not answer:\n{output}")
    print(output.strip(), flush=True)


def unknown_host(network: Network, run_file: Path) -> None:
    absent = f"{PREFIX}9"
    refused(network, run_file, [network.addresses["alpha"], absent], absent)
    if (run_file.parent / "run").exists():
        raise Failed("something was written for a launch that was refused")


def host_vanishes(network: Network, run_file: Path) -> None:
    run, hosts = run_file.parent / "run", list(network.addresses.values())
    process = launch(network, run_file, hosts)
    try:
        until = time.monotonic() + ENOUGH
        while not checkpoints(run):
            if time.monotonic() > until or process.poll() is not None:
                os.killpg(process.pid, signal.SIGKILL)
                raise Failed(f"no checkpoint on two hosts:\n{process.communicate()[0]}")
            time.sleep(0.2)
        print("a rank on each trains; beta vanishes", flush=True)
        network.cut_off("beta")
        cut = time.monotonic()
        try:
            output, _ = process.communicate(timeout=2 * MINUTE)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise Failed(f"alpha lives on two minutes later:\n{process.communicate()[0]}") from error
    finally:
        process.kill()
    seconds = time.monotonic() - cut
    said = output[output.find("Error:") :]
    print(f"{said.strip()}\nalpha ended {seconds:.0f} s after beta had vanished, with status {process.returncode}")
    if seconds > MINUTE:
        raise Failed("that is more than a minute")
    for pattern in (
        r"Error: rank 0 has lost another rank, which does not answer; --resume continues",
        r"rank 1 on beta was lost with its node",
    ):
        if not re.search(pattern, output):
            raise Failed(f"it does not say '{pattern}':\n{output}")
    refused(network, run_file, hosts, network.addresses["beta"], "--resume")


if __name__ == "__main__":
    sys.exit(main())
