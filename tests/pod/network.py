"""Hosts of their own on this machine: network namespaces with addresses, joined by a bridge.

    python tests/pod/network.py --hosts 2 --processes-per-host 2 -m pytest tests/test_collective.py

runs a program in two processes on each of two hosts, as root.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from freeio_jax.launch.pod import _MEMBER, member_environment


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@functools.cache
def why_not() -> str | None:
    """Why this process cannot make hosts; None if it can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if shutil.which("ip") is None:
        return "there is no command ip (package iproute2)"
    try:
        with Network(1):
            return None
    except (subprocess.CalledProcessError, OSError) as error:
        return f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}"


class Network:
    """``num_hosts`` hosts that reach each other; a context manager, which removes them.

    Each has an address, a name, and a file ``/etc/hosts`` by which all know all names.
    """

    def __init__(self, num_hosts: int):
        self._tag = f"fio{secrets.token_hex(3)}"
        # 100.64.0.0/10 is for carriers' own use, so it is no address of this machine.
        self._net = f"100.{64 + secrets.randbelow(64)}.{secrets.randbelow(256)}"
        self.num_hosts = num_hosts
        self._stack = contextlib.ExitStack()

    def namespace(self, host: int) -> str:
        return f"{self._tag}n{host}"

    def address(self, host: int) -> str:
        return f"{self._net}.{host + 1}"

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._build(stack)
            self._stack = stack.pop_all()
        return self

    def _build(self, stack):
        # The bridge is in a namespace of its own: nothing of this machine's network changes.
        switch = f"{self._tag}sw"
        _ip("netns", "add", switch)
        stack.callback(_ip, "netns", "del", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in range(self.num_hosts):
            namespace, link = self.namespace(host), f"host{host}"
            _ip("netns", "add", namespace)
            stack.callback(_ip, "netns", "del", namespace)
            _ip(
                *("link", "add", "eth0", "netns", namespace, "type", "veth"),
                *("peer", "name", link, "netns", switch),
            )
            _ip("-n", switch, "link", "set", link, "master", "bridge", "up")
            _ip("-n", namespace, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            # `ip netns exec` shows the files of this folder under /etc.
            folder = Path("/etc/netns") / namespace
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder)
            # The name of the machine is that of each host, at an address of its own.
            (folder / "hosts").write_text(
                f"127.0.0.1 localhost\n{self.address(host)} {os.uname().nodename}\n"
            )

    def __exit__(self, *error):
        self._stack.close()

    def cut(self, host: int) -> None:
        """Takes the link of a host away."""
        _ip("-n", self.namespace(host), "link", "set", "eth0", "down")


class Pod:
    """A program in ``processes_per_host`` processes on each host of a network.

    JAX's coordinator is on host 0.

    Args:
      program: command line after ``python``.
      on_line: called with (rank, line) for each line that a process writes to its stdout or stderr.

    Attributes:
      lines: what each process has written.
    """

    def __init__(
        self, network, program, *, processes_per_host=1, devices_per_process=1, on_line=None
    ):
        self._network = network
        self._program = [*map(str, program)]
        self._per_host = processes_per_host
        self._devices = devices_per_process
        self._on_line = on_line
        count = network.num_hosts * processes_per_host
        self.lines: list[list[str]] = [[] for _ in range(count)]
        self.processes: list[subprocess.Popen] = []

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid

    def _start(self, rank: int) -> subprocess.Popen:
        environment = member_environment(
            rank,
            num_processes=len(self.lines),
            devices_per_process=self._devices,
            platform="cpu",
            # A port of a namespace of its own, so nobody else has it.
            coordinator=f"{self._network.address(0)}:7000",
        )
        # These hosts reach no proxy.
        environment = {
            name: value
            for name, value in (os.environ | environment).items()
            if not name.lower().endswith("_proxy")
        }
        namespace = self._network.namespace(rank // self._per_host)
        # `ip` becomes the program, so its pid is the program's.
        return subprocess.Popen(
            [
                *("ip", "netns", "exec", namespace),
                *(sys.executable, str(_MEMBER), str(os.getpid()), *self._program),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _read(self, rank: int) -> None:
        for line in self.processes[rank].stdout:
            self.lines[rank].append(line.rstrip("\n"))
            if self._on_line is not None:
                self._on_line(self, rank, line)

    def run(self, timeout: float | None) -> list[int]:
        """The exit status of each process; those that have not ended by then are killed."""
        try:
            for rank in range(len(self.lines)):
                self.processes.append(self._start(rank))
            readers = [
                threading.Thread(target=self._read, args=(rank,)) for rank in range(len(self.lines))
            ]
            for reader in readers:
                reader.start()
            end = None if timeout is None else time.monotonic() + timeout
            for reader in readers:
                reader.join(None if end is None else max(0.0, end - time.monotonic()))
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
        for reader in readers:
            reader.join()
        return [process.wait() for process in self.processes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--processes-per-host", type=int, default=1)
    parser.add_argument("--devices-per-process", type=int, default=1)
    options, program = parser.parse_known_args()
    if (trouble := why_not()) is not None:
        print(f"left out: {trouble}")
        return 0
    with Network(options.hosts) as network:
        pod = Pod(
            network,
            program,
            processes_per_host=options.processes_per_host,
            devices_per_process=options.devices_per_process,
            on_line=lambda _, rank, line: print(f"[{rank}] {line}", end="", flush=True),
        )
        return max(map(abs, pod.run(None)))


if __name__ == "__main__":
    sys.exit(main())
