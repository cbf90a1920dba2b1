"""Hosts that are network namespaces of this one: a bridge, a link, a name and an ssh server for each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
"""Program -> Debian package."""
PREFIX = "10.213.77."
BRIDGE = "hzbr0"
INTERFACE = "eth0"
"""Of every host."""


def search_path() -> str:
    """Where daemons lie, too."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str | None:
    """Say why there can be no such hosts here, None if there can."""
    packages = {package for program, package in PROGRAMS.items() if shutil.which(program, path=search_path()) is None}
    if packages:
        return f"programs are missing here; apt-get install {' '.join(sorted(packages))}."
    if os.geteuid() != 0:
        return "network namespaces need root here."
    tried = subprocess.run(["ip", "netns", "add", "hz-probe"], capture_output=True, text=True, env=_environment())
    if tried.returncode != 0:
        return f"network namespaces cannot be made here ({tried.stderr.strip()})."
    subprocess.run(["ip", "netns", "delete", "hz-probe"], check=True, env=_environment())
    return None


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": search_path()}


class Network:
    """Some hosts between their start and their end; nothing of them lives on."""

    def __init__(self, root: Path, names: tuple[str, ...]) -> None:
        self.root = root
        self.addresses = {name: f"{PREFIX}{number}" for number, name in enumerate(names, start=1)}
        self.servers: list[subprocess.Popen[bytes]] = []
        self.environment = {**_environment(), "PATH": f"{root}/bin:{search_path()}"}
        """In which `ssh` knows the hosts and is let in."""

    def __enter__(self) -> Network:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self._keys()
        self._ip("link", "add", BRIDGE, "type", "bridge")
        self._ip("link", "set", BRIDGE, "up")
        for name, address in self.addresses.items():
            space, outer = f"hz-{name}", f"hz-{name}"
            self._ip("netns", "add", space)
            self._ip("link", "add", outer, "type", "veth", "peer", "name", INTERFACE, "netns", space)
            self._ip("link", "set", outer, "master", BRIDGE, "up")
            self._ip("-n", space, "address", "add", f"{address}/24", "dev", INTERFACE)
            self._ip("-n", space, "link", "set", INTERFACE, "up")
            self._ip("-n", space, "link", "set", "lo", "up")
            self._serve(name)
        for name in self.addresses:
            self._wait_for(name)

    def _ip(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], env=_environment(), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    def _keys(self) -> None:
        """A key by which hosts let each other in, and an `ssh` that uses it."""
        root = self.root
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)], check=True)
        shutil.copy(root / "user_key.pub", root / "authorized_keys")
        options = [f"IdentityFile {root}/user_key", "StrictHostKeyChecking no", f"UserKnownHostsFile {root}/known"]
        (root / "ssh_config").write_text("\n".join([*options, "LogLevel ERROR"]) + "\n")
        (root / "bin").mkdir()
        program = root / "bin" / "ssh"
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {root}/ssh_config "$@"\n')
        program.chmod(0o755)

    def _serve(self, name: str) -> None:
        """Start a host's ssh server; who comes in has the host's name, and the `ssh` that is let in elsewhere."""
        settings = [
            f"HostKey {self.root}/host_key",
            f"AuthorizedKeysFile {self.root}/authorized_keys",
            f"PidFile {self.root}/sshd-{name}.pid",
            "StrictModes no",
            "UsePAM no",
            "PermitRootLogin yes",
            "PasswordAuthentication no",
            f"SetEnv PATH={self.root}/bin:{search_path()}",
        ]
        config = self.root / f"sshd-{name}.conf"
        config.write_text("\n".join(settings) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        server = f"hostname {name}; exec {shutil.which('sshd', path=search_path())} -D -e -f {config}"
        with open(self.root / f"sshd-{name}.log", "wb") as log:
            command = self.inside(name, "sh", "-c", server)
            self.servers.append(
                subprocess.Popen(command, env=_environment(), stdout=log, stderr=log, start_new_session=True)
            )

    def inside(self, name: str, *command: str) -> list[str]:
        """The command that runs another one on a host."""
        return ["ip", "netns", "exec", f"hz-{name}", "unshare", "--uts", *command]

    def _wait_for(self, name: str) -> None:
        first = next(iter(self.addresses))
        command = self.inside(first, "ssh", "-o", "ConnectTimeout=2", self.addresses[name], "hostname")
        until = time.monotonic() + 30
        while time.monotonic() < until:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
            if done.stdout.strip() == name:
                return
            time.sleep(0.3)
        log = (self.root / f"sshd-{name}.log").read_text()
        raise RuntimeError(f"host {name} does not answer: {done.stderr.strip()}\n{log}")

    def cut_off(self, name: str) -> None:
        """Let a host vanish: its link is down, and what runs there stands still, as without power."""
        self._ip("link", "set", f"hz-{name}", "down")
        for pid in self.processes(name):
            os.kill(pid, signal.SIGSTOP)

    def processes(self, *names: str) -> list[int]:
        """All processes on some hosts, or on all."""
        found: list[int] = []
        for name in names or self.addresses:
            command = ["ip", "netns", "pids", f"hz-{name}"]
            done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
            found += map(int, done.stdout.split())
        return found

    def __exit__(self, *error: object) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for server in self.servers:
            server.kill()
            server.wait()
        for name in self.addresses:
            subprocess.run(["ip", "netns", "delete", f"hz-{name}"], env=_environment(), capture_output=True)
            subprocess.run(["ip", "link", "delete", f"hz-{name}"], env=_environment(), capture_output=True)
        subprocess.run(["ip", "link", "delete", BRIDGE], env=_environment(), capture_output=True)
