"""A pod of local processes: starts them, prefixes their output, and ends them together."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from freeio_jax.launch.output import Printer

_MEMBER = Path(__file__).with_name("member.py")

#: Address of JAX's coordinator, with which all processes connect.
_LOOPBACK = "127.0.0.1"

#: Time from the request to end until the process is killed.
_TERMINATION_SECONDS = 3.0

#: ``JAX_PLATFORMS`` on which a process must be told which GPUs are its own.
GPU_PLATFORMS = ("cuda", "gpu")


def _reserve_port() -> socket.socket:
    """A loopback port that is reserved while the socket is open.

    gRPC, which serves JAX's coordinator, binds with SO_REUSEPORT and so may share the port. The
    kernel gives it to no other process that asks for any free port.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind((_LOOPBACK, 0))
    return reserved


def around_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep the processes' own connections away from a proxy; none without a proxy.

    gRPC, which serves JAX's coordinator, uses the proxy for every address that is not excepted. It
    reads ``no_proxy`` only where ``no_grpc_proxy`` is not set.
    """
    names = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
    if not any(environment.get(name) or environment.get(name.upper()) for name in names):
        return {}
    changed = {}
    # Programs that know both read NO_PROXY only where there is no no_proxy.
    excepted = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    for name, before in (
        ("no_proxy", excepted),
        ("NO_PROXY", environment.get("NO_PROXY") or excepted),
        ("no_grpc_proxy", environment.get("no_grpc_proxy") or excepted),
    ):
        listed = [entry.strip() for entry in before.split(",") if entry.strip()]
        listed += [entry for entry in (_LOOPBACK, "localhost") if entry not in listed]
        changed[name] = ",".join(listed)
    return changed


def visible_gpus() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` may name: the GPUs it names already, or all of this host."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        devices = Path("/proc/driver/nvidia/gpus")
        return [str(i) for i in range(len(list(devices.iterdir())))] if devices.exists() else []
    # CUDA ignores an invalid entry and all that follow it.
    names = [name.strip() for name in listed.split(",")]
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


def member_environment(
    rank: int,
    *,
    num_processes: int,
    devices_per_process: int,
    platform: str,
    coordinator: str,
    num_hosts: int = 1,
    gpus: Sequence[str] = (),
) -> dict[str, str]:
    """The variables that process ``rank`` has beside, or instead of, those of this process.

    ``num_hosts``: virtual hosts, if more than one.
    ``gpus``: the GPUs that the pod may use. Each process sees ``devices_per_process`` of them.

    Raises:
      ValueError: there are too few GPUs.
    """
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", "")
    )
    flags += f" --xla_force_host_platform_device_count={devices_per_process}"
    environment = {
        "XLA_FLAGS": flags.strip(),
        "JAX_NUM_CPU_DEVICES": str(devices_per_process),  # JAX prefers it to the flag
        "JAX_PLATFORMS": platform,
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_COORDINATOR_BIND_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(rank),
        "PYTHONUNBUFFERED": "1",
        **around_proxies(os.environ),
    }
    if num_hosts > 1:
        environment["FREEIO_HOST_SIZE"] = str(num_processes // num_hosts * devices_per_process)
    if platform.split(",")[0] in GPU_PLATFORMS:
        needed = num_processes * devices_per_process
        if needed > len(gpus):
            named = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise ValueError(
                f"{num_processes} processes of {devices_per_process} GPU(s) need {needed} GPUs, "
                f"and there are {len(gpus)}"
                + (f" (CUDA_VISIBLE_DEVICES={named})" if named is not None else "")
            )
        first = rank * devices_per_process
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + devices_per_process])
    return environment


class Pod:
    """``num_processes`` processes of one Python program on this host.

    Args:
      program: command line after ``python``: a script, or ``-m`` and a module, then arguments.
      num_processes: how many.
      devices_per_process: CPU devices, or GPUs, of each.
      num_hosts: virtual hosts, each of equally many processes; 1: none.
      platform: ``JAX_PLATFORMS`` of each. On GPUs the visible GPUs are shared out in order,
        ``devices_per_process`` to each process.
      grace: when a process has failed, the others have these seconds to end by themselves, so that
        their own errors are shown, too.
      output: ``(rank, stream name, line)`` is called for each line that a process writes, one
        call at a time. None writes it to this process's stream, after ``[rank]``, and unfinished
        lines as far as they have come.

    Process 0 reads what this process would read (stdin), so that a debugger runs there; the others
    find nothing to read.

    Raises:
      ValueError: there are too few GPUs.
    """

    def __init__(
        self,
        program: Sequence[str],
        *,
        num_processes: int,
        devices_per_process: int = 1,
        num_hosts: int = 1,
        platform: str = "cpu",
        grace: float = 5.0,
        output=None,
    ):
        self._program = list(program)
        self._num_processes = num_processes
        self._environment = functools.partial(
            member_environment,
            num_processes=num_processes,
            devices_per_process=devices_per_process,
            num_hosts=num_hosts,
            platform=platform,
            gpus=visible_gpus(),
        )
        self._environment(num_processes - 1, coordinator="")  # raises if there are too few GPUs
        self._grace = grace
        self._printer = Printer(num_processes, output)
        self._interrupted: int | None = None
        self.processes: list[subprocess.Popen] = []

    def run(self) -> int:
        """Runs the program; returns 0, or the status of the first process that failed.

        A process ended by signal s counts as status 128 + s. SIGINT and SIGTERM are passed on.
        """
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(contextlib.closing(_reserve_port())).getsockname()[1]
            stack.callback(self._kill)
            self._pass_on_signals(stack)
            readers = []
            for rank in range(self._num_processes):
                process = self._start(rank, f"{_LOOPBACK}:{port}")
                self.processes.append(process)
                for name in ("stdout", "stderr"):
                    reader = threading.Thread(
                        target=self._printer.copy, args=(rank, name, getattr(process, name))
                    )
                    reader.start()
                    readers.append(reader)
            status = self._supervise()
            # A grandchild that outlives its parent may keep the pipes open.
            deadline = time.monotonic() + _TERMINATION_SECONDS
            for reader in readers:
                reader.join(max(0.0, deadline - time.monotonic()))
            return status

    def _start(self, rank: int, coordinator: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(_MEMBER), str(os.getpid()), *self._program],
            env=os.environ | self._environment(rank, coordinator=coordinator),
            # Process 0 inherits stdin, so a terminal's keys reach the program unchanged.
            stdin=None if rank == 0 else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # In a session of its own, Ctrl-C reaches the process only once, from here, and a signal
            # to its group also ends its children.
            start_new_session=True,
        )

    def _pass_on_signals(self, stack: contextlib.ExitStack) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def handle(number, _frame):
            # A second signal ends the processes at once.
            self._signal(signal.SIGKILL if self._interrupted else number)
            self._interrupted = number

        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, handle))

    def _running(self) -> list[int]:
        return [i for i, process in enumerate(self.processes) if process.poll() is None]

    def _signal(self, number: int) -> None:
        """Sends a signal to every running process and its children."""
        for rank in self._running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[rank].pid, number)

    def _wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _supervise(self) -> int:
        failed = None
        while self._running() and failed is None and not self._interrupted:
            time.sleep(0.02)
            failed = self._first_failure()
        if self._interrupted:
            if not self._wait(self._grace):
                self._end_the_rest()
            return 128 + self._interrupted
        failed = self._first_failure()
        if failed is None:
            return 0
        rank, status = failed
        process = self.processes[rank]
        how = f"ended with status {status}"
        if process.returncode < 0:
            how = f"was ended by {signal.Signals(-process.returncode).name}"
        self._printer.say(f"process {rank} (pid {process.pid}) {how}")
        if not self._wait(self._grace):
            self._end_the_rest()
        return status

    def _first_failure(self) -> tuple[int, int] | None:
        for rank, process in enumerate(self.processes):
            if process.poll():
                code = process.returncode
                return rank, code if code > 0 else 128 - code
        return None

    def _end_the_rest(self) -> None:
        late = ", ".join(f"{r} (pid {self.processes[r].pid})" for r in self._running())
        self._printer.say(f"stopping process(es) {late}; where they were follows")
        # member.py prints all threads' stacks on SIGUSR2.
        self._signal(signal.SIGUSR2)
        time.sleep(0.5)
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        if not self._wait(_TERMINATION_SECONDS):
            self._kill()

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._wait(_TERMINATION_SECONDS)
