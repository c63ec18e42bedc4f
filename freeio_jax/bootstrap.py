"""How the processes of a program find and connect with those that share their host.

Each process publishes its host and the name of its socket in JAX's key-value store. The name is
random and in the abstract namespace, so it vanishes with the process. Then each pair of processes
of a host makes one connection. Each checks that the other one belongs to the same user, which the
kernel tells (SO_PEERCRED), and that it knows the job's token. So no other user or job takes part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import socket
import struct
import threading
import time
from pathlib import Path

from freeio_jax import log

_SEND_BUFFER = 4 << 20

#: Seconds between two checks that the awaited processes have not ended.
_LOOK_SECONDS = 0.2

#: After this wait the log says which processes are missing, and again each time it has doubled.
_PATIENCE_SECONDS = 30.0


class BootstrapError(RuntimeError):
    """The processes of this program could not be connected."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another process of this host, and the connection with it."""

    process: int
    pid: int
    control: tuple[int, int]
    connection: socket.socket


def host_identity() -> str:
    """Equal in processes that can connect by abstract sockets: of one boot, in one network."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')}"


def has_ended(name: str) -> bool:
    """Whether the process that listened at ``name`` does so no longer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.setblocking(False)
        return caller.connect_ex(f"\0{name}") == errno.ECONNREFUSED


def credentials(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, from the kernel."""
    size = struct.calcsize("3i")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


class Listener:
    """Takes connections from processes of this user that know the token; closes all others."""

    def __init__(self, process: int, token: str, control: tuple[int, int]):
        self.name = f"freeio-jax-{secrets.token_hex(16)}"
        self._hello = {"token": token, "process": process, "control": list(control)}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(4096)  # or as many as the kernel allows

    def close(self) -> None:
        self._socket.close()

    def accept(self, deadline: float) -> Peer | None:
        """The next connection, or None if it was not from this job.

        Raises:
          TimeoutError: no process connected until ``deadline`` (of ``time.monotonic``).
        """
        self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
        connection, _ = self._socket.accept()
        with contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            pid, uid = credentials(connection)
            if uid != os.geteuid():
                return None
            try:
                # A process of this job says hello at once. One that does not must not hold up the
                # others.
                peer = self._read_hello(connection, pid, min(deadline, time.monotonic() + 5.0))
                if peer is None:
                    return None
                connection.send(json.dumps(self._hello).encode())
            except OSError:
                return None
            stack.pop_all()
            return peer

    def connect(self, process: int, name: str, deadline: float) -> Peer:
        """Connects with the listener ``name`` of ``process``.

        Raises:
          ConnectionError: there is none, or it ended.
          BootstrapError: it is another user's, or it does not know the token.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                connection.connect(f"\0{name}")
                pid, uid = credentials(connection)
                if uid != os.geteuid():
                    raise BootstrapError(
                        f"freeio_jax: process {process} (pid {pid}) runs as user {uid}, this one "
                        f"as user {os.geteuid()}: all processes must be of one user."
                    )
                connection.send(json.dumps(self._hello).encode())
                peer = self._read_hello(connection, pid, deadline)
            except ConnectionError:
                raise
            except OSError as error:
                raise BootstrapError(
                    f"freeio_jax: process {process} of this host could not be connected: {error}."
                ) from error
            if peer is None or peer.process != process:
                raise BootstrapError(
                    f"freeio_jax: what answers for process {process} is not of this job."
                )
            stack.pop_all()
            return peer

    def _read_hello(self, connection: socket.socket, pid: int, deadline: float) -> Peer | None:
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        message = connection.recv(4096)
        if not message:
            raise ConnectionResetError("closed")
        try:
            hello = json.loads(message)
            token, process = str(hello["token"]), int(hello["process"])
            address, nonce = map(int, hello["control"])
        except (ValueError, KeyError, TypeError):
            return None
        if not secrets.compare_digest(token.encode(), self._hello["token"].encode()):
            return None
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        connection.setblocking(False)
        return Peer(process, pid, (address, nonce), connection)


def _absent(client, where: str, num_processes: int) -> str:
    """Which processes have not come, in words; empty where the store does not answer."""
    try:
        came = {
            int(key.rsplit("/", 1)[1]) for key, _ in client.key_value_dir_get(f"{where}/process/")
        }
    except RuntimeError:
        return ""
    return f", which leaves process(es) {sorted(set(range(num_processes)) - came)}"


@contextlib.contextmanager
def _logging_absence(client, where: str, process: int, num_processes: int, timeout: float):
    """Logs which processes have not come, while the body waits for them."""
    came = threading.Event()

    def tell():
        seconds = _PATIENCE_SECONDS
        wait = seconds
        while not came.wait(wait):
            log.logger.warning(
                "freeio_jax.initialize: process %d has waited %g s (it gives up after %g s) for "
                "the others to call it%s",
                process,
                seconds,
                timeout,
                _absent(client, where, num_processes),
            )
            wait, seconds = seconds, 2 * seconds

    teller = threading.Thread(target=tell, name="freeio_jax initialize", daemon=True)
    teller.start()
    try:
        yield
    finally:
        came.set()
        teller.join()


def connect(
    client,
    process: int,
    num_processes: int,
    control: tuple[int, int],
    timeout: float,
    *,
    generation: int,
) -> tuple[list[Peer], list[int]]:
    """Connects this process with the others of its host. Every process must call it.

    Args:
      client: JAX's client of the key-value store.
      control: address and nonce of this process's control block, for the peers.
      timeout: seconds until all must have called.
      generation: how often the processes have been connected, this time included.

    Returns:
      (peers of this host, numbers of the processes of other hosts).

    Raises:
      BootstrapError: not all processes came in time, or could be connected.
    """
    where = f"freeio_jax/{generation}"
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        try:
            with _logging_absence(client, where, process, num_processes, timeout):
                if process == 0:
                    client.key_value_set(f"{where}/token", secrets.token_hex(16))
                token = client.blocking_key_value_get(f"{where}/token", int(timeout * 1000))
                listener = Listener(process, token, control)
                stack.callback(listener.close)
                me = {"host": host_identity(), "name": listener.name, "pid": os.getpid()}
                client.key_value_set(f"{where}/process/{process}", json.dumps(me))
                client.wait_at_barrier(f"{where}/published", int(timeout * 1000))
            published = client.key_value_dir_get(f"{where}/process/")
        except RuntimeError as error:  # what jaxlib's client raises, DEADLINE_EXCEEDED included
            raise BootstrapError(
                f"freeio_jax.initialize: not all {num_processes} processes came within "
                f"{timeout:g} s{_absent(client, where, num_processes)}. Every process must call "
                f"it, after jax.distributed.initialize(). ({error})"
            ) from error
        others = {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in published}
        del others[process]
        here = {p for p, other in others.items() if other["host"] == me["host"]}
        peers: dict[int, Peer] = {}

        def ended(other: int) -> BootstrapError:
            return BootstrapError(
                f"freeio_jax.initialize: process {other} (pid {others[other]['pid']}) ended while "
                f"process {process} connected with it."
            )

        stack.callback(lambda: [peer.connection.close() for peer in peers.values()])
        for other in sorted(p for p in here if p < process):
            try:
                peers[other] = listener.connect(other, others[other]["name"], deadline)
            except ConnectionError as error:
                raise ended(other) from error
        awaited = {p for p in here if p > process}
        while awaited:
            try:
                peer = listener.accept(min(deadline, time.monotonic() + _LOOK_SECONDS))
            except TimeoutError as error:
                # A process listens until it is connected with all others of its host. So one that
                # does not listen, and is not connected with this process, has ended.
                for other in sorted(awaited):
                    if has_ended(others[other]["name"]):
                        raise ended(other) from error
                if time.monotonic() < deadline:
                    continue
                late = ", ".join(f"{p} (pid {others[p]['pid']})" for p in sorted(awaited))
                raise BootstrapError(
                    f"freeio_jax.initialize: process(es) {late} of this host did not connect "
                    f"within {timeout:g} s."
                ) from error
            if peer is not None and peer.process in awaited:
                awaited.remove(peer.process)
                peers[peer.process] = peer
            elif peer is not None:
                peer.connection.close()
        stack.pop_all()
        listener.close()
        return list(peers.values()), sorted(set(others) - here)
