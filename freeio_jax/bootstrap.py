"""How the processes of a program find and connect with each other.

Each process publishes its host and the name of its socket in JAX's key-value store. The name is
random and in the abstract namespace, so it vanishes with the process. Then each pair of processes
of a host makes one connection. Each checks that the other one belongs to the same user, which the
kernel tells (SO_PEERCRED), and that it knows the job's token. So no other user or job takes part.

Between hosts each pair makes a TCP connection, and both check that the other one knows the token.
The address is that from which the process reaches JAX's coordinator; on the coordinator's own host
that may be a loopback address, and then it is the one by which the other hosts reach the
coordinator. Where all share a host, no process listens on a network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import json
import math
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from freeio_jax import log
from freeio_jax.hosts import Host

_SEND_BUFFER = 4 << 20

#: Bytes of what two processes tell each other first.
_MAX_HELLO = 4096

#: A process of this job says hello at once. After this many seconds of silence it is none.
_HELLO_SECONDS = 5.0

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


@dataclasses.dataclass
class _Caller:
    """Who connected and has not said hello yet."""

    connection: socket.socket
    pid: int | None
    give_up: float
    said: bytes = b""


class Listener:
    """Takes connections from processes of this user that know the token; closes all others.

    Attributes:
      name: what :meth:`connect` of another process must know.
    """

    def __init__(self, process: int, token: str, control: tuple[int, int]):
        self._token = token.encode()
        hello = {"token": token, "process": process, "pid": os.getpid(), "control": list(control)}
        self._hello = json.dumps(hello).encode() + b"\n"
        self._socket = self._bind()
        self._socket.listen(4096)  # or as many as the kernel allows
        self._socket.setblocking(False)
        # Callers are heard together, so that one that says nothing does not hold up the others.
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

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
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def accept(self, deadline: float) -> Peer | None:
        """The next process of this job; None when a connection was closed that is of no such one.

        Raises:
          TimeoutError: no process connected until ``deadline`` (of ``time.monotonic``).
        """
        while True:
            now = time.monotonic()
            callers = [key.data for key in self._selector.get_map().values() if key.data]
            for caller in callers:
                if caller.give_up <= now:
                    self._selector.unregister(caller.connection)
                    caller.connection.close()
                    return None
            if deadline <= now:
                raise TimeoutError
            until = min([deadline, *(caller.give_up for caller in callers)])
            for key, _ in self._selector.select(until - now):
                if key.data is None:
                    if not self._admit():
                        return None
                elif self._has_said_hello(key.data):
                    self._selector.unregister(key.data.connection)
                    return self._answer(key.data)

    def _admit(self) -> bool:
        """Whether who connects is a process of this user, or may be one."""
        try:
            connection, _ = self._socket.accept()
        except OSError:  # it has gone again
            return False
        with contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            pid, uid = self._credentials(connection)
            if uid != os.geteuid():
                return False
            connection.setblocking(False)
            caller = _Caller(connection, pid, time.monotonic() + _HELLO_SECONDS)
            self._selector.register(connection, selectors.EVENT_READ, caller)
            stack.pop_all()
            return True

    def _has_said_hello(self, caller: _Caller) -> bool:
        """Reads what has come. True when that is all: a hello, or what cannot become one."""
        try:
            while not self._is_whole(caller.said):
                part = self._receive(caller.connection)
                if not part:
                    return True
                caller.said += part
        except BlockingIOError:
            return False
        except OSError:
            caller.said = b""
        return True

    def _answer(self, caller: _Caller) -> Peer | None:
        peer = self._peer(caller.said, caller.connection, caller.pid)
        try:
            if peer is not None:
                peer.connection.sendall(self._hello)
                return peer
        except OSError:
            pass
        caller.connection.close()
        return None

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
                connection.sendall(self._hello)
                peer = self._peer(self._listen_to(connection, deadline), connection, pid)
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

    def refused(self, name) -> str:
        """What it means that nobody listens at ``name``, for errors."""
        return "ended"

    def _listen_to(self, connection: socket.socket, deadline: float) -> bytes:
        said = b""
        while not self._is_whole(said):
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self._receive(connection)
            if not part:
                raise ConnectionResetError("closed")
            said += part
        return said

    def _is_whole(self, said: bytes) -> bool:
        """Whether that is all of a hello: here it comes as one message."""
        return bool(said)

    def _receive(self, connection: socket.socket) -> bytes:
        """Something of a hello, and nothing of what comes behind it."""
        return connection.recv(_MAX_HELLO)

    def _peer(self, said: bytes, connection: socket.socket, pid: int | None) -> Peer | None:
        """The process that said so; None: it is not of this job."""
        try:
            hello = json.loads(said)
            if not secrets.compare_digest(str(hello["token"]).encode(), self._token):
                return None
            address, nonce = map(int, hello["control"])
            process, pid = int(hello["process"]), int(hello["pid"]) if pid is None else pid
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        connection.setblocking(False)
        return Peer(process, pid, (address, nonce), connection)


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

    def refused(self, name) -> str:
        return f"ended, or a firewall between the hosts refuses connections {self.where(name)},"

    def _is_whole(self, said: bytes) -> bool:
        return said.endswith(b"\n") or len(said) >= _MAX_HELLO

    def _receive(self, connection: socket.socket) -> bytes:
        return connection.recv(1)  # what comes behind the line is for the engines


def _in_network(coordinator: str | None) -> dict[str, str]:
    """The addresses of this host and of JAX's coordinator, as this host sees them; or an error."""
    if coordinator is None:
        return {"error": "JAX does not say where its coordinator is"}
    host, port = coordinator.rsplit(":", 1)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as caller:
            caller.connect(address)  # sends nothing
            return {"mine": caller.getsockname()[0], "coordinator": address[0]}
    except (OSError, ValueError) as error:
        return {"error": f"JAX's coordinator ({coordinator}) has no address here: {error}"}


def _address(process: int, networks: dict[int, dict[str, str]]) -> str:
    """The address of a process for other hosts, from what :func:`_in_network` says in each."""
    mine = networks[process]["mine"]
    if not ipaddress.ip_address(mine).is_loopback:
        return mine
    # It is on the coordinator's host, whose own name may mean 127.0.1.1 there.
    seen = (networks[p]["coordinator"] for p in sorted(networks))
    return next((one for one in seen if not ipaddress.ip_address(one).is_loopback), mine)


class _Store:
    """JAX's key-value store, for one :func:`connect`."""

    def __init__(self, client, where: str, process: int, num_processes: int, timeout: float):
        self._client, self._where = client, where
        self._process, self._num_processes = process, num_processes
        self.timeout, self.deadline = timeout, time.monotonic() + timeout

    def token(self) -> str:
        """A secret of the job: process 0 makes it."""
        if self._process == 0:
            self._client.key_value_set(f"{self._where}/token", secrets.token_hex(16))
        with self._in_time(lambda: ", which leaves process 0"):
            return self._client.blocking_key_value_get(f"{self._where}/token", self._rest_ms())

    def publish(self, key: str, value: Any) -> dict[int, Any]:
        """What all processes publish under ``key``, by process."""
        folder = f"{self._where}/{key}/"
        self._client.key_value_set(f"{folder}{self._process}", json.dumps(value))
        with self._in_time(lambda: self.absent(key)):
            self._client.wait_at_barrier(f"{folder}published", self._rest_ms())
        return {
            int(name.rsplit("/", 1)[1]): json.loads(text)
            for name, text in self._client.key_value_dir_get(folder)
        }

    def absent(self, key: str) -> str:
        """Which processes have not published it; empty where the store does not answer."""
        try:
            published = self._client.key_value_dir_get(f"{self._where}/{key}/")
        except RuntimeError:
            return ""
        came = {int(name.rsplit("/", 1)[1]) for name, _ in published}
        return f", which leaves process(es) {sorted(set(range(self._num_processes)) - came)}"

    def _rest_ms(self) -> int:
        return max(1, int(1000 * (self.deadline - time.monotonic())))

    @contextlib.contextmanager
    def _in_time(self, absent: Callable[[], str]):
        try:
            yield
        except RuntimeError as error:  # what jaxlib's client raises, DEADLINE_EXCEEDED included
            raise BootstrapError(
                f"freeio_jax.initialize: not all {self._num_processes} processes came within "
                f"{self.timeout:g} s{absent()}. Every process must call it, after "
                f"jax.distributed.initialize(). ({error})"
            ) from error


@contextlib.contextmanager
def _logging_waits(process: int, timeout: float, for_whom: Callable[[], str]):
    """Logs for whom the body waits, while it does."""
    done = threading.Event()

    def tell():
        seconds = _PATIENCE_SECONDS
        wait = seconds
        while not done.wait(wait):
            log.logger.warning(
                "freeio_jax.initialize: process %d has waited %g s (it gives up after %g s) for %s",
                process,
                seconds,
                timeout,
                for_whom(),
            )
            wait, seconds = seconds, 2 * seconds

    teller = threading.Thread(target=tell, name="freeio_jax initialize", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
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
        alike = published[process]["alike"]
        for name in {**published[first]["alike"], **alike}:
            value, expected = alike.get(name), published[first]["alike"].get(name)
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
    process = me.process
    store = _Store(client, f"freeio_jax/{generation}", process, num_processes, timeout)
    with contextlib.ExitStack() as stack:
        with _logging_waits(
            process, timeout, lambda: "the others to call it" + store.absent("process")
        ):
            token = store.token()
            listener = Listener(process, token, me.control)
            stack.callback(listener.close)
            all_of_them = store.publish(
                "process",
                {
                    "host": host_identity(),
                    "virtual_host": me.virtual_host,
                    "hostname": socket.gethostname(),
                    "name": listener.name,
                    "pid": os.getpid(),
                    "alike": me.alike,
                    "network": _in_network(coordinator),
                },
            )
        _check_alike(all_of_them)
        identity = all_of_them[process]["host"]
        here = {p for p, one in all_of_them.items() if one["host"] == identity} - {process}
        names = {p: all_of_them[p]["name"] for p in here}
        listeners: dict[Listener, set[int]] = {listener: here}
        # All processes know alike whether they share a host.
        if len(here) + 1 < num_processes:
            network, reached_at = _meet_in_network(me, token, store, all_of_them)
            stack.callback(network.close)
            listeners[network] = set(all_of_them) - here - {process}
            names.update({p: reached_at[p] for p in listeners[network]})
        peers: dict[int, Peer] = {}
        known = {p: (name, all_of_them[p]["pid"]) for p, name in names.items()}
        stack.callback(lambda: [peer.connection.close() for peer in peers.values()])

        def not_connected() -> str:
            missing = ", ".join(f"{p} (pid {known[p][1]})" for p in sorted(set(known) - set(peers)))
            return f"connections with process(es) {missing}"

        with _logging_waits(process, timeout, not_connected):
            for one, of_listener in listeners.items():
                _connect_by(one, process, of_listener, known, store.deadline, timeout, peers)
        stack.pop_all()
        for one in listeners:
            one.close()
        return [peers[p] for p in sorted(peers)], _hosts_of(all_of_them)


def _meet_in_network(
    me: Self, token: str, store: _Store, published: dict[int, dict]
) -> tuple[NetworkListener, dict[int, Any]]:
    """A listener for processes of other hosts, and the names of all such, by process.

    Raises:
      BootstrapError: a process has no address, or cannot listen there. All processes raise it.
    """

    def check(errors: dict[int, str]) -> None:
        for process, error in sorted(errors.items()):
            raise BootstrapError(
                f"freeio_jax.initialize: this program has several hosts, and process {process} "
                f"(pid {published[process]['pid']}, {published[process]['hostname']}) cannot "
                f"listen for those of other hosts: {error}. Hosts meet in the network of JAX's "
                "coordinator: give jax.distributed.initialize an address that all of them know."
            )

    networks = {p: one["network"] for p, one in published.items()}
    check({p: one["error"] for p, one in networks.items() if "error" in one})
    address = _address(me.process, networks)
    with contextlib.ExitStack() as stack:
        try:
            network = NetworkListener(me.process, token, me.control, address, store.timeout)
            stack.callback(network.close)
            told = network.name
        except OSError as error:
            told = {"error": f"{address}: {error}"}
        names = store.publish("address", told)
        check({p: one["error"] for p, one in names.items() if isinstance(one, dict)})
        stack.pop_all()
        return network, names


def _connect_by(listener, process, others, known, deadline, timeout, peers) -> None:
    """Connects with ``others`` and enters them in ``peers``. ``known``: (name, pid) of each."""

    def refused(other: int) -> BootstrapError:
        name, pid = known[other]
        return BootstrapError(
            f"freeio_jax.initialize: process {other} (pid {pid}) {listener.refused(name)} while "
            f"process {process} connected with it."
        )

    for other in sorted(p for p in others if p < process):
        try:
            peers[other] = listener.connect(other, known[other][0], deadline)
        except ConnectionError as error:
            raise refused(other) from error
    awaited = {p for p in others if p > process}
    while awaited:
        try:
            peer = listener.accept(min(deadline, time.monotonic() + _LOOK_SECONDS))
        except TimeoutError as error:
            # A process listens until it is connected with all others. So one that does not listen,
            # and is not connected with this process, has ended.
            for other in sorted(awaited):
                if listener.has_ended(known[other][0]):
                    raise refused(other) from error
            if time.monotonic() < deadline:
                continue
            late = ", ".join(
                f"{p} (pid {known[p][1]}, {listener.where(known[p][0])})" for p in sorted(awaited)
            )
            raise BootstrapError(
                f"freeio_jax.initialize: process(es) {late} did not connect within {timeout:g} s."
            ) from error
        if peer is not None and peer.process in awaited:
            awaited.remove(peer.process)
            peers[peer.process] = peer
        elif peer is not None:
            peer.connection.close()
