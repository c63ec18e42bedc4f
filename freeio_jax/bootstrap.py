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
import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from freeio_jax import log
from freeio_jax.hosts import Host
from freeio_jax.listeners import (
    LOOK_SECONDS,
    BootstrapError,
    Listener,
    NetworkListener,
    Peer,
)

#: After this wait the log says which processes are missing, and again each time it has doubled.
_PATIENCE_SECONDS = 30.0


def host_identity() -> str:
    """Equal in processes that can connect by abstract sockets: of one boot, in one network."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')}"


def _in_network(coordinator: str | None) -> dict[str, str]:
    """The addresses of this host and of JAX's coordinator, as this host sees them; or an error."""
    if coordinator is None:
        return {"error": "JAX does not say where its coordinator is"}
    try:
        host, port = coordinator.rsplit(":", 1)
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
            peer = listener.accept(min(deadline, time.monotonic() + LOOK_SECONDS))
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
