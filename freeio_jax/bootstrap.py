"""How the processes of a program find and connect with each other.

Each process publishes its host and the name of its socket in JAX's key-value store. The name is
random and in the abstract namespace, so it vanishes with the process. Then each pair of processes
of a host makes one connection. Each checks that the other one belongs to the same user, which the
kernel tells (SO_PEERCRED), and that it knows the job's token. So no other user or job takes part.

Between hosts each pair makes a TCP connection, and both check that the other one knows the token.
The address is that from which the process reaches JAX's coordinator. Where all share a host, no
process listens on a network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import secrets
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

from freeio_jax import log
from freeio_jax.hosts import Host

_SEND_BUFFER = 4 << 20

#: Bytes of what two processes tell each other first.
_MAX_HELLO = 4096

#: Seconds between two checks that the awaited processes have not ended.
_LOOK_SECONDS = 0.2

#: After this wait the log says which processes are missing, and again each time it has doubled.
_PATIENCE_SECONDS = 30.0


class BootstrapError(RuntimeError):
    """The processes of this program could not be connected."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another process of the program, and the connection with it."""

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
    """Takes connections from processes of this user that know the token; closes all others.

    Attributes:
      name: what :meth:`connect` of another process must know.
    """

    def __init__(self, process: int, token: str, control: tuple[int, int]):
        self._hello = {
            "token": token,
            "process": process,
            "pid": os.getpid(),
            "control": list(control),
        }
        self._socket = self._bind()
        self._socket.listen(4096)  # or as many as the kernel allows

    def _bind(self) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.name = f"freeio-jax-{secrets.token_hex(16)}"
        listening.bind(f"\0{self.name}")
        return listening

    def _call(self, name, deadline: float) -> socket.socket:
        """A connection with the listener of this name."""
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            caller.settimeout(max(deadline - time.monotonic(), 1e-3))
            caller.connect(f"\0{name}")
        except BaseException:
            caller.close()
            raise
        return caller

    def has_ended(self, name) -> bool:
        """Whether the process that listened at ``name`` does so no longer."""
        return has_ended(name)

    def _credentials(self, connection: socket.socket) -> tuple[int | None, int]:
        """(pid, uid) at the other end. No pid: its hello says it."""
        return credentials(connection)

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
            pid, uid = self._credentials(connection)
            if uid != os.geteuid():
                return None
            try:
                # A process of this job says hello at once. One that does not must not hold up the
                # others.
                peer = self._read_hello(connection, pid, min(deadline, time.monotonic() + 5.0))
                if peer is None:
                    return None
                connection.sendall(json.dumps(self._hello).encode() + b"\n")
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
        with contextlib.ExitStack() as stack:
            try:
                connection = self._call(name, deadline)
                stack.callback(connection.close)
                pid, uid = self._credentials(connection)
                if uid != os.geteuid():
                    raise BootstrapError(
                        f"freeio_jax: process {process} (pid {pid}) runs as user {uid}, this one "
                        f"as user {os.geteuid()}: all processes must be of one user."
                    )
                connection.sendall(json.dumps(self._hello).encode() + b"\n")
                peer = self._read_hello(connection, pid, deadline)
            except ConnectionError:
                raise
            except OSError as error:
                raise BootstrapError(
                    f"freeio_jax: process {process} {self.where(name)} could not be connected: "
                    f"{error}."
                ) from error
            if peer is None or peer.process != process:
                raise BootstrapError(
                    f"freeio_jax: what answers for process {process} is not of this job."
                )
            stack.pop_all()
            return peer

    def where(self, name) -> str:
        """Where the listener of that name is, for errors."""
        return "of this host"

    def _read_hello(
        self, connection: socket.socket, pid: int | None, deadline: float
    ) -> Peer | None:
        message = self._read_line(connection, deadline)
        try:
            hello = json.loads(message)
            token, process = str(hello["token"]), int(hello["process"])
            address, nonce = map(int, hello["control"])
            pid = int(hello["pid"]) if pid is None else pid
        except (ValueError, KeyError, TypeError):
            return None
        if not secrets.compare_digest(token.encode(), self._hello["token"].encode()):
            return None
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        connection.setblocking(False)
        return Peer(process, pid, (address, nonce), connection)

    def _read_line(self, connection: socket.socket, deadline: float) -> bytes:
        """One message, which came at once."""
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        message = connection.recv(_MAX_HELLO)
        if not message:
            raise ConnectionResetError("closed")
        return message


#: A connection between hosts counts as broken after this silence, or after the time-out of an
#: exchange if that is longer. Broken it stays, while after a time-out a program can go on.
_LEAST_SILENCE_SECONDS = 30
#: The kernel asks for a sign of life after this silence, and then this often until the end.
_KEEPALIVE_IDLE, _KEEPALIVE_PROBES = 10, 20
#: The most seconds between two probes that the kernel takes.
_MAX_KEEPALIVE_INTERVAL = 32767


def _keepalive(timeout: float) -> dict[int, int]:
    """Options of a TCP connection, and their values: after which silence it is broken."""
    silence = max(_LEAST_SILENCE_SECONDS, timeout)
    interval = math.ceil((silence - _KEEPALIVE_IDLE) / _KEEPALIVE_PROBES)
    interval = min(interval, _MAX_KEEPALIVE_INTERVAL)
    return {
        socket.TCP_KEEPIDLE: _KEEPALIVE_IDLE,
        socket.TCP_KEEPINTVL: interval,
        socket.TCP_KEEPCNT: _KEEPALIVE_PROBES,
        # The same bound where something was sent and nobody answers, in milliseconds.
        socket.TCP_USER_TIMEOUT: 1000 * (_KEEPALIVE_IDLE + interval * _KEEPALIVE_PROBES),
    }


class NetworkListener(Listener):
    """The same between hosts. Its name is (address, port).

    Args:
      address: of this host, under which the others can reach it.
      timeout: seconds that a rank waits for its peers in one exchange.
    """

    def __init__(
        self, process: int, token: str, control: tuple[int, int], address: str, timeout: float
    ):
        self._address = address
        self._keepalive = _keepalive(timeout)
        super().__init__(process, token, control)

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.bind((self._address, 0))
        self.name = listening.getsockname()[:2]
        return listening

    def _call(self, name, deadline: float) -> socket.socket:
        return socket.create_connection(tuple(name), max(deadline - time.monotonic(), 1e-3))

    def has_ended(self, name) -> bool:
        try:
            socket.create_connection(tuple(name), _LOOK_SECONDS).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # slow, or out of reach: the time-out decides
        return False

    def _credentials(self, connection: socket.socket) -> tuple[int | None, int]:
        # Users of different hosts are not compared: the token shows that it is this job.
        for option, value in {socket.TCP_NODELAY: 1, **self._keepalive}.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return None, os.geteuid()

    def where(self, name) -> str:
        return "at {}, port {}".format(*name)

    def _read_line(self, connection: socket.socket, deadline: float) -> bytes:
        # Byte by byte: what comes behind the line is for the engines.
        line = b""
        while not line.endswith(b"\n") and len(line) < _MAX_HELLO:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            byte = connection.recv(1)
            if not byte:
                raise ConnectionResetError("closed")
            line += byte
        return line


def address_towards(coordinator: str) -> str:
    """The address from which this host reaches JAX's coordinator, ``host:port``.

    Raises:
      OSError: the coordinator's host has no address, or cannot be reached.
    """
    host, port = coordinator.rsplit(":", 1)
    family, kind, _, _, address = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as caller:
        caller.connect(address)  # sends nothing
        return caller.getsockname()[0]


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


@dataclasses.dataclass(frozen=True)
class Self:
    """What a process tells the others of itself.

    Attributes:
      process: its number.
      control: address and nonce of its control block.
      virtual_host: the number of its virtual host; None: there are none.
      alike: what must be equal in all processes, by name.
    """

    process: int
    control: tuple[int, int]
    virtual_host: int | None = None
    alike: dict[str, Any] = dataclasses.field(default_factory=dict)


def _check_alike(published: dict[int, dict]) -> None:
    first, *others = sorted(published)
    for process in others:
        for name, value in published[process]["alike"].items():
            expected = published[first]["alike"].get(name)
            if value != expected:
                raise BootstrapError(
                    f"freeio_jax.initialize: {name} is {expected} in process {first} (pid "
                    f"{published[first]['pid']}, {published[first]['hostname']}) and {value} in "
                    f"process {process} (pid {published[process]['pid']}, "
                    f"{published[process]['hostname']}): it must be the same in all processes."
                )


def _hosts_of(published: dict[int, dict]) -> list[Host]:
    processes: dict[tuple, list[int]] = {}
    for process in sorted(published):
        one = published[process]
        processes.setdefault((one["host"], one["virtual_host"]), []).append(process)
    return [
        Host(number, published[of_host[0]]["hostname"], tuple(of_host))
        for number, of_host in enumerate(processes.values())
    ]


def connect(
    client,
    me: Self,
    num_processes: int,
    timeout: float,
    *,
    generation: int,
    coordinator: str | None = None,
) -> tuple[list[Peer], list[Host]]:
    """Connects this process with all others. Every process must call it.

    Args:
      client: JAX's client of the key-value store.
      me: this process.
      timeout: seconds until all must have called. Between hosts a connection also lasts through
        a silence of this length.
      generation: how often the processes have been connected, this time included.
      coordinator: ``host:port`` of JAX's coordinator. Hosts reach each other in its network.

    Returns:
      (the other processes, all hosts).

    Raises:
      BootstrapError: not all processes came in time, or could be connected, or they are not alike.
    """
    where, process = f"freeio_jax/{generation}", me.process
    deadline = time.monotonic() + timeout

    def publish(key: str, value: Any) -> dict[int, Any]:
        """What all processes publish under ``key``, by process."""
        client.key_value_set(f"{where}/{key}/{process}", json.dumps(value))
        client.wait_at_barrier(f"{where}/{key}/published", int(timeout * 1000))
        return {
            int(name.rsplit("/", 1)[1]): json.loads(text)
            for name, text in client.key_value_dir_get(f"{where}/{key}/")
        }

    with contextlib.ExitStack() as stack:
        try:
            with _logging_absence(client, where, process, num_processes, timeout):
                if process == 0:
                    client.key_value_set(f"{where}/token", secrets.token_hex(16))
                token = client.blocking_key_value_get(f"{where}/token", int(timeout * 1000))
                listener = Listener(process, token, me.control)
                stack.callback(listener.close)
                others = publish(
                    "process",
                    {
                        "host": host_identity(),
                        "virtual_host": me.virtual_host,
                        "hostname": socket.gethostname(),
                        "name": listener.name,
                        "pid": os.getpid(),
                        "alike": me.alike,
                    },
                )
                _check_alike(others)
                hosts = _hosts_of(others)
                mine = others.pop(process)
                here = {p for p, other in others.items() if other["host"] == mine["host"]}
                names = {p: others[p]["name"] for p in here}
                listeners = {listener: here}
                # All processes know alike whether they share a host.
                if len({other["host"] for other in (*others.values(), mine)}) > 1:
                    network = _listen_on_network(me, token, coordinator, timeout)
                    stack.callback(network.close)
                    reached_at = publish("address", network.name)
                    listeners[network] = set(others) - here
                    names.update({p: reached_at[p] for p in listeners[network]})
        except RuntimeError as error:  # what jaxlib's client raises, DEADLINE_EXCEEDED included
            if isinstance(error, BootstrapError):
                raise
            raise BootstrapError(
                f"freeio_jax.initialize: not all {num_processes} processes came within "
                f"{timeout:g} s{_absent(client, where, num_processes)}. Every process must call "
                f"it, after jax.distributed.initialize(). ({error})"
            ) from error
        peers: dict[int, Peer] = {}
        stack.callback(lambda: [peer.connection.close() for peer in peers.values()])
        known = {p: (names[p], others[p]["pid"]) for p in others}
        for one, of_listener in listeners.items():
            _connect_by(one, process, of_listener, known, deadline, timeout, peers)
        stack.pop_all()
        for one in listeners:
            one.close()
        return [peers[p] for p in sorted(peers)], hosts


def _listen_on_network(
    me: Self, token: str, coordinator: str | None, timeout: float
) -> NetworkListener:
    if coordinator is None:
        raise BootstrapError(
            "freeio_jax.initialize: this program has several hosts, and JAX does not say where its "
            "coordinator is. Call jax.distributed.initialize() first."
        )
    try:
        address = address_towards(coordinator)
        return NetworkListener(me.process, token, me.control, address, timeout)
    except OSError as error:
        raise BootstrapError(
            f"freeio_jax.initialize: process {me.process} cannot listen for processes of other "
            f"hosts in the network of JAX's coordinator ({coordinator}): {error}."
        ) from error


def _connect_by(listener, process, others, known, deadline, timeout, peers) -> None:
    """Connects with ``others`` and enters them in ``peers``. ``known``: (name, pid) of each."""

    def ended(other: int) -> BootstrapError:
        return BootstrapError(
            f"freeio_jax.initialize: process {other} (pid {known[other][1]}) ended while "
            f"process {process} connected with it."
        )

    for other in sorted(p for p in others if p < process):
        try:
            peers[other] = listener.connect(other, known[other][0], deadline)
        except ConnectionError as error:
            raise ended(other) from error
    awaited = {p for p in others if p > process}
    while awaited:
        try:
            peer = listener.accept(min(deadline, time.monotonic() + _LOOK_SECONDS))
        except TimeoutError as error:
            # A process listens until it is connected with all others. So one that does not listen,
            # and is not connected with this process, has ended.
            for other in sorted(awaited):
                if listener.has_ended(known[other][0]):
                    raise ended(other) from error
            if time.monotonic() < deadline:
                continue
            late = ", ".join(f"{p} (pid {known[p][1]})" for p in sorted(awaited))
            raise BootstrapError(
                f"freeio_jax.initialize: process(es) {late} did not connect within {timeout:g} s."
            ) from error
        if peer is not None and peer.process in awaited:
            awaited.remove(peer.process)
            peers[peer.process] = peer
        elif peer is not None:
            peer.connection.close()
