"""How processes of a host find each other, and whom they do not let in."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from freeio_jax import _native, bootstrap, listeners, runtime
from freeio_jax.listeners import BootstrapError, Listener, NetworkListener

NOBODY = 65534


class Store:
    """JAX's key-value store, for threads of one process."""

    def __init__(self, num_processes):
        self._values = {}
        self._changed = threading.Condition()
        self._num_processes = num_processes
        self._barriers = {}

    def key_value_set(self, key, value):
        with self._changed:
            assert key not in self._values
            self._values[key] = value
            self._changed.notify_all()

    def _wait(self, ready, milliseconds):
        if not self._changed.wait_for(ready, milliseconds / 1000):
            raise RuntimeError("DEADLINE_EXCEEDED")

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            self._wait(lambda: key in self._values, milliseconds)
            return self._values[key]

    def wait_at_barrier(self, barrier, milliseconds):
        with self._changed:
            self._barriers[barrier] = self._barriers.get(barrier, 0) + 1
            self._changed.notify_all()
            self._wait(lambda: self._barriers[barrier] == self._num_processes, milliseconds)

    def key_value_dir_get(self, folder):
        with self._changed:
            return [(k, v) for k, v in self._values.items() if k.startswith(folder)]


def connect_all(
    num_processes,
    timeout=20.0,
    absent=(),
    host_of=None,
    alike=None,
    monkeypatch=None,
    coordinator="127.0.0.1:1",
):
    """(peers, hosts) of each process, or what it raised."""
    store, results = Store(num_processes), {}
    if host_of is not None:
        monkeypatch.setattr(
            bootstrap, "host_identity", lambda: host_of(int(threading.current_thread().name))
        )

    def run(process):
        try:
            me = bootstrap.Self(
                process,
                (process, 100 + process),
                alike={} if alike is None else {"the colour": alike(process)},
            )
            results[process] = bootstrap.connect(
                store, me, num_processes, timeout, generation=1, coordinator=coordinator
            )
        except BootstrapError as error:
            results[process] = error

    threads = [
        threading.Thread(target=run, args=(p,), name=str(p))
        for p in range(num_processes)
        if p not in absent
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_pair_has_a_connection(monkeypatch):
    results = connect_all(5, monkeypatch=monkeypatch)
    for process, (peers, hosts) in results.items():
        assert [host.processes for host in hosts] == [(0, 1, 2, 3, 4)]
        assert {p.process for p in peers} == set(range(5)) - {process}
        for peer in peers:
            assert peer.pid == os.getpid()
            assert peer.control == (peer.process, 100 + peer.process)
            peer.connection.send(f"{process}-{peer.process}".encode())
    for process, (peers, _) in results.items():
        for peer in peers:
            peer.connection.settimeout(10)
            assert peer.connection.recv(100) == f"{peer.process}-{process}".encode()
            peer.connection.close()


def test_processes_of_other_hosts_are_told_apart(monkeypatch):
    """Sockets of the kernel within a host, and TCP between hosts."""
    results = connect_all(5, host_of=lambda process: f"host {process % 2}", monkeypatch=monkeypatch)
    for process, (peers, hosts) in results.items():
        assert [host.processes for host in hosts] == [(0, 2, 4), (1, 3)]
        assert [host.number for host in hosts] == [0, 1]
        assert [p.process for p in peers] == [p for p in range(5) if p != process]
        for peer in peers:
            is_here = peer.process % 2 == process % 2
            family = socket.AF_UNIX if is_here else socket.AF_INET
            assert peer.connection.family == family
            assert peer.pid == os.getpid()
            peer.connection.send(f"{process}-{peer.process}".encode())
    for process, (peers, _) in results.items():
        for peer in peers:
            peer.connection.settimeout(10)
            assert peer.connection.recv(100) == f"{peer.process}-{process}".encode()
            peer.connection.close()


@pytest.mark.parametrize("timeout, least", [(3.0, 30), (600.0, 600), (1e9, 600_000)])
def test_connections_between_hosts_last_through_a_time_out(timeout, least):
    """And through 30 s, however short the time-out is; the kernel takes no more than 7 days."""
    listener = bootstrap.NetworkListener(0, "token", (1, 2), "127.0.0.1", timeout)
    with contextlib.closing(listener), contextlib.ExitStack() as stack:
        caller = stack.enter_context(listener._call(listener.name, time.monotonic() + 10))
        accepted, _ = listener._socket.accept()
        stack.enter_context(accepted)
        for end in (caller, accepted):
            listener._credentials(end)
            idle, interval, probes, milliseconds = (
                end.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    *(socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT),
                    socket.TCP_USER_TIMEOUT,
                )
            )
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            # A process that is gone is noticed when the bound is over, and soon after silence.
            assert idle <= 10
            assert least <= idle + interval * probes <= 1.1 * least
            assert milliseconds == 1000 * (idle + interval * probes)


def test_the_time_out_reaches_the_connections(monkeypatch):
    results = connect_all(
        2, timeout=60.0, host_of=lambda process: f"host {process}", monkeypatch=monkeypatch
    )
    for peers, _ in results.values():
        for peer in peers:
            option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
            assert peer.connection.getsockopt(*option) >= 60_000
            peer.connection.close()


def test_processes_that_are_not_alike(monkeypatch):
    results = connect_all(3, alike=lambda process: "red" if process != 2 else "blue")
    for error in results.values():
        assert isinstance(error, BootstrapError)
        assert "the colour is red in process 0" in str(error)
        assert "and blue in process 2" in str(error)


@pytest.mark.parametrize(
    "platform, owner, name, told",
    [
        ("cpu", _native, "protocol", "the protocol of freeio_jax's native module"),
        ("gpu", _native.cuda_sizes, "max_ranks", "the build option FREEIO_MAX_RANKS"),
    ],
)
def test_builds_that_are_not_alike(platform, owner, name, told, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: platform)
    here = runtime._alike()
    monkeypatch.setattr(owner, name, 77)
    there = runtime._alike()
    results = connect_all(2, alike=lambda process: (here, there)[process][told])
    for error in results.values():
        assert isinstance(error, BootstrapError)
        assert "and 77 in process 1" in str(error)


def test_the_size_of_gpu_blocks_does_not_matter_on_cpu(monkeypatch):
    here = runtime._alike()
    monkeypatch.setattr(_native.cuda_sizes, "max_ranks", 77)
    assert runtime._alike() == here


def test_a_process_that_does_not_come(monkeypatch):
    results = connect_all(3, timeout=0.5, absent=(2,), monkeypatch=monkeypatch)
    for process in (0, 1):
        assert isinstance(results[process], BootstrapError)
        assert "not all 3 processes came within 0.5 s" in str(results[process])
        assert "which leaves process(es) [2]" in str(results[process])


@pytest.fixture
def listener():
    listener = Listener(0, "token", (1, 2))
    yield listener
    listener.close()


def call(name, message):
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    caller.settimeout(10)
    caller.connect(f"\0{name}")
    # It may be closed before it has spoken.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        caller.send(message)
    return caller


def closed_silently(caller):
    """Whether the other end was closed without a word."""
    try:
        return caller.recv(100) == b""
    except ConnectionResetError:
        return True


HELLO = {"token": "token", "process": 1, "control": [3, 4]}
HOSTILE = [
    b"[" * 4000,
    json.dumps(HELLO | {"process": float("inf")}).encode(),
    json.dumps(HELLO | {"token": "\ud800"}).encode(),
]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x00\xff garbage",
        b"[]",
        json.dumps(HELLO | {"token": "another"}).encode(),
        json.dumps({"token": "token", "process": 1}).encode(),
        json.dumps(HELLO | {"control": ["x", 1]}).encode(),
        *HOSTILE,
    ],
)
def test_foreign_messages_are_not_answered(message, listener):
    with call(listener.name, message) as caller:
        if not message:
            caller.shutdown(socket.SHUT_WR)
        assert listener.accept(time.monotonic() + 10) is None
        assert closed_silently(caller)
    # And the next one is served.
    with call(listener.name, json.dumps(HELLO).encode()) as caller:
        peer = listener.accept(time.monotonic() + 10)
        assert (peer.process, peer.control) == (1, (3, 4))
        assert json.loads(caller.recv(4096))["process"] == 0
        peer.connection.close()


@pytest.fixture
def network_listener():
    listener = NetworkListener(0, "token", (1, 2), "127.0.0.1", 10.0)
    yield listener
    listener.close()


def accept(listener, seconds=10.0):
    """The next peer, whatever else connects."""
    deadline = time.monotonic() + seconds
    while (peer := listener.accept(deadline)) is None:
        pass
    return peer


@pytest.mark.parametrize(
    "message", [b"", b"\n", b"x" * 5000, b"\x00\xff\n", *(one + b"\n" for one in HOSTILE)]
)
def test_foreign_messages_from_another_host_are_not_answered(message, network_listener):
    with socket.create_connection(network_listener.name, 10) as caller:
        caller.sendall(message)
        caller.shutdown(socket.SHUT_WR)
        assert network_listener.accept(time.monotonic() + 10) is None
        assert closed_silently(caller)


def test_callers_that_say_nothing_hold_up_nobody(network_listener, monkeypatch):
    begin = time.monotonic()
    hello = json.dumps(HELLO | {"pid": 77}).encode() + b"\nwhat follows"
    with contextlib.ExitStack() as stack:
        for said in (b"", b'{"tok', b""):
            silent = stack.enter_context(socket.create_connection(network_listener.name, 10))
            silent.sendall(said)
        caller = stack.enter_context(socket.create_connection(network_listener.name, 10))
        for part in (hello[:10], hello[10:]):
            caller.sendall(part)
        peer = accept(network_listener)
        assert (peer.process, peer.pid) == (1, 77)
        assert time.monotonic() - begin < listeners._HELLO_SECONDS
        # What comes behind the hello is still there.
        peer.connection.settimeout(10)
        assert peer.connection.recv(100) == b"what follows"
        peer.connection.close()
        with pytest.raises(TimeoutError):
            network_listener.accept(time.monotonic() + 0.1)
        assert caller.recv(4096).endswith(b"\n")
    monkeypatch.setattr(listeners, "_HELLO_SECONDS", 0.05)
    with socket.create_connection(network_listener.name, 10) as silent:
        while not closed_silently_now(silent):
            with contextlib.suppress(TimeoutError):
                network_listener.accept(time.monotonic() + 0.1)


def closed_silently_now(caller):
    caller.settimeout(0.01)
    try:
        return closed_silently(caller)
    except TimeoutError:
        return False


def test_a_host_whose_own_name_is_a_loopback_address():
    """As Debian's /etc/hosts has it: the others know the coordinator's address."""
    networks = {
        0: {"mine": "127.0.0.1", "coordinator": "127.0.1.1"},
        1: {"mine": "10.0.0.2", "coordinator": "10.0.0.1"},
        2: {"mine": "fd00::2", "coordinator": "10.0.0.1"},
    }
    addresses = [bootstrap._address(process, networks) for process in networks]
    assert addresses == ["10.0.0.1", "10.0.0.2", "fd00::2"]


def test_a_process_that_cannot_listen_is_told_to_all(monkeypatch):
    def address(process, networks):
        return "192.0.2.1" if process == 1 else "127.0.0.1"  # nobody's

    monkeypatch.setattr(bootstrap, "_address", address)
    begin = time.monotonic()
    results = connect_all(3, host_of=lambda process: f"host {process}", monkeypatch=monkeypatch)
    for error in results.values():
        assert isinstance(error, BootstrapError)
        assert re.search(r"process 1 \(pid \d+, \S+\) cannot listen.*: 192.0.2.1", str(error))
    assert time.monotonic() - begin < 10


def test_a_coordinator_without_an_address_is_told_to_all(monkeypatch):
    results = connect_all(
        2,
        host_of=lambda process: f"host {process}",
        monkeypatch=monkeypatch,
        coordinator="no-such-host.invalid:1",
    )
    for error in results.values():
        assert "JAX's coordinator (no-such-host.invalid:1) has no address here" in str(error)
    assert "has no address here" in bootstrap._in_network("without a port")["error"]


def test_a_refused_connection_between_hosts_may_be_a_firewalls(monkeypatch):
    class Closed(NetworkListener):
        """Its port is another one than it says."""

        def _bind(self):
            listening = super()._bind()
            with socket.socket() as other:
                other.bind(("127.0.0.1", 0))
                self.name = other.getsockname()
            return listening

    monkeypatch.setattr(bootstrap, "NetworkListener", Closed)
    results = connect_all(2, host_of=lambda process: f"host {process}", monkeypatch=monkeypatch)
    for error in results.values():
        assert re.search(
            r"process \d \(pid \d+\) ended, or a firewall between the hosts refuses connections at "
            r"127.0.0.1, port \d+, while process \d connected",
            str(error),
        ), error


def as_another_user(program, *arguments):
    """A process of nobody's, which runs the program: with a socket, `end`, and a `name` for it."""
    prelude = f"import os, socket, sys; os.setuid({NOBODY}); name = chr(0) + sys.argv[1]\n"
    prelude += "end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); end.settimeout(10)\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(program), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@as_root
def test_another_user_is_not_let_in(listener):
    caller = """
        end.connect(name)
        try:
            end.send(sys.argv[2].encode())
            sys.exit(end.recv(100) != b"")
        except (BrokenPipeError, ConnectionResetError):
            pass
    """
    with as_another_user(caller, listener.name, json.dumps(HELLO)) as child:
        assert listener.accept(time.monotonic() + 10) is None
        assert child.wait(10) == 0


@as_root
def test_a_listener_of_another_user_is_not_trusted(listener):
    imposter = """
        end.bind(name)
        end.listen()
        print("ready", flush=True)
        sys.stdin.read()
    """
    name = f"freeio-jax-test-{os.getpid()}"
    with as_another_user(imposter, name) as child:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(BootstrapError, match=f"runs as user {NOBODY}"):
            listener.connect(1, name, time.monotonic() + 10)


@pytest.mark.parametrize(
    "pid, control, error",
    [
        (0, 0, "process 1 of this host is in another PID namespace than process 0"),
        # The address is nobody's, and so is the number, in that order of looking.
        (os.getpid(), 1, r"the memory of process 1 \(pid \d+\) cannot be read: .* Bad address"),
        (2**22 - 1, 0, r"process 1 \(pid 4194303\) ended while process 0 connected with it"),
    ],
    ids=["other namespace", "nobody's address", "ended"],
)
def test_memory_that_cannot_be_read(pid, control, error):
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other, pytest.raises(RuntimeError, match=f"freeio_jax.initialize: {error}"):
        _native.join_pod(0, [(1, pid, "", control, 1, mine.detach())], read_memory=True)


def test_nobody_listens(listener):
    with pytest.raises(ConnectionRefusedError):
        listener.connect(3, "freeio-jax-nobody", time.monotonic() + 10)


def test_a_listener_that_closes_without_an_answer(listener):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        name = f"freeio-jax-test-{os.getpid()}"
        other.bind(f"\0{name}")
        other.listen()
        closer = threading.Thread(target=lambda: other.accept()[0].close())
        closer.start()
        with pytest.raises(ConnectionError):
            listener.connect(1, name, time.monotonic() + 10)
        closer.join()


def test_a_caller_that_ends_before_it_is_answered(listener):
    call(listener.name, json.dumps(HELLO).encode()).close()
    assert listener.accept(time.monotonic() + 10) is None
