"""Connections between the processes of a job, and whom they do not let in.

Within a host they are sockets of the kernel, which tells the user at the other end. Between hosts
they are TCP connections. Both ends must know the job's token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import secrets
import selectors
import socket
import struct
import time

_SEND_BUFFER = 4 << 20

#: Bytes of what two processes tell each other first.
_MAX_HELLO = 4096

#: A process of this job says hello at once. After this many seconds of silence it is none.
_HELLO_SECONDS = 5.0

#: Seconds between two checks that the awaited processes have not ended.
LOOK_SECONDS = 0.2


class BootstrapError(RuntimeError):
    """The processes of this program could not be connected."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another process of the program, and the connection with it."""

    process: int
    pid: int
    control: tuple[int, int]
    connection: socket.socket


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
            socket.create_connection(tuple(name), LOOK_SECONDS).close()
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
