"""The processes of a program as a pod: :func:`initialize`, :func:`shutdown`, and forks."""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import importlib.metadata
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jaxlib.version
from jax._src import distributed

from freeio_jax import _native, bootstrap, hosts, log, settings

_pod_is_connected = False
_generation = 0  # how often this process has been connected
_members: dict[int, int] = {}  # pid of each other process that is connected


@dataclasses.dataclass(frozen=True)
class PodMember:
    """What an engine does when this process joins and leaves a pod.

    Attributes:
      join: called when the processes of this host are connected.
      leave: called before this process disconnects.
      end: called at the end of the process, if it was ever in a pod. It is in none any more, and
        JAX's coordinator still connects the processes.
    """

    join: Callable[[], None]
    leave: Callable[[], None]
    end: Callable[[], None] = lambda: None


_pod_members: list[PodMember] = []


def add_pod_member(member: PodMember) -> None:
    """Makes :func:`initialize` and :func:`shutdown` call an engine."""
    _pod_members.append(member)


def members() -> dict[int, int] | None:
    """Pids of the other processes, by process; None before :func:`initialize`."""
    return dict(_members) if _pod_is_connected else None


def store(folder: str, at_most: float = math.inf) -> bootstrap.Store:
    """A folder of JAX's key-value store for the last pod.

    Its timeout is the setting, but not more than ``at_most`` seconds.
    """
    return bootstrap.Store(
        distributed.global_state.client,
        f"freeio_jax/{_generation}/{folder}",
        jax.process_index(),
        jax.process_count(),
        min(settings.config()["timeout"], at_most),
    )


def processes_here() -> set[int]:
    """The processes of this host, this one included: those that are known."""
    me = jax.process_index()
    return next((set(h.processes) for h in hosts.of_program() if me in h.processes), {me})


def _alike() -> dict[str, Any]:
    """What must be equal in all processes."""
    try:
        version = importlib.metadata.version("freeio_jax")
    except importlib.metadata.PackageNotFoundError:  # a tree on the path, not installed
        version = "unknown"
    alike = {
        "the version of freeio_jax": version,
        "the protocol of freeio_jax's native module": _native.protocol,
        "the version of jaxlib": jaxlib.version.__version__,
        "the kind of machine": f"{platform.machine()}, {sys.byteorder} endian",
        "the setting host_size": settings.config()["host_size"],
        "the setting transport": settings.config()["transport"],
    }
    # Only GPUs write to each other's GPU blocks, whose layout follows from this option.
    if jax.default_backend() != "cpu":
        alike["the build option FREEIO_MAX_RANKS"] = _native.cuda_sizes.max_ranks
    return alike


def initialize() -> None:
    """Call after ``jax.distributed.initialize()`` in a program of several processes.

    Every process must call it. It finds which of them share a host, and connects all; no arguments
    are needed, and further calls do nothing. In one process there is nothing to initialize, and
    calling this is harmless.

    Raises:
      RuntimeError: ``jax.distributed.initialize()`` was not called, not all processes came within
        the ``timeout`` setting, they have different versions of freeio_jax, or the kernel forbids
        that those of a host read each other's memory (CPU), or the driver that they map it (GPUs).
        After an error the process is in no pod.
      ValueError: the setting ``host_size`` does not fit the devices of a process.
    """
    global _pod_is_connected, _generation
    if _pod_is_connected or jax.process_count() == 1:
        return
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError(
            f"freeio_jax.initialize: this program has {jax.process_count()} processes, but "
            "jax.distributed.initialize() was not called in it, which is how they find each other."
        )
    start = time.monotonic()
    _native.allow_peers_to_read()
    _generation += 1
    me = jax.process_index()
    peers, of_program = bootstrap.connect(
        client,
        bootstrap.Self(
            me,
            _native.control_block(),
            hosts.virtual_host(jax.devices(), me, settings.config()["host_size"]),
            _alike(),
        ),
        jax.process_count(),
        settings.config()["timeout"],
        generation=_generation,
        coordinator=distributed.global_state.coordinator_address,
    )
    host_of = {p: host for host in of_program for p in host.processes}
    members = [
        (
            p.process,
            p.pid,
            "" if host_of[p.process] == host_of[me] else str(host_of[p.process]),
            *p.control,
            p.connection.detach(),
        )
        for p in peers
    ]
    # Only the CPU engine reads the peers' memory, so only there the kernel must allow it.
    _native.join_pod(me, members, read_memory=jax.default_backend() == "cpu")
    hosts.connect(of_program)
    _pod_is_connected = True
    _members.update({p.process: p.pid for p in peers})
    log.logger.info(
        "process %d (pid %d) of %d is connected with all others in %.3f s. %s",
        me,
        os.getpid(),
        jax.process_count(),
        time.monotonic() - start,
        "; ".join(f"{host}: processes {[*host.processes]}" for host in of_program),
    )
    # It runs before JAX's own exit handler, which waits for the other processes. They must know by
    # then that this process leaves.
    atexit.unregister(_end)
    atexit.register(_end)
    try:
        for member in _pod_members:
            member.join()
    except BaseException:
        shutdown()
        raise


def shutdown() -> None:
    """Leaves the pod: the counterpart of :func:`initialize`, called by itself at exit.

    Exchanges with other processes that still run, here or there, end with an error; so do later
    ones, unless every process calls :func:`initialize` again. Without a pod it does nothing.
    """
    global _pod_is_connected
    if _pod_is_connected:
        for member in _pod_members:
            member.leave()
        _native.leave_pod()
        _members.clear()
        hosts.disconnect()
        _pod_is_connected = False


def _end() -> None:
    shutdown()
    if distributed.global_state.client is None:
        return  # the program has called jax.distributed.shutdown()
    for member in _pod_members:
        member.end()


class _Forking(threading.local):
    """The signals that the forking thread had blocked before the fork; None outside a pod."""

    mask: set | None = None


_forking = _Forking()


def _hold_sigterm() -> None:
    """Before a fork: a SIGTERM has to wait until the child has a handler that ends it."""
    _forking.mask = None
    if _pod_is_connected:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_sigterm_come() -> None:
    """Undoes :func:`_hold_sigterm`, in the parent and in the child."""
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _start_as_child() -> None:
    _forget_pod()
    _let_sigterm_come()


def _forget_pod() -> None:
    """In a forked child, which is in no pod: its end must not look like the end of its parent."""
    global _pod_is_connected
    atexit.unregister(_end)
    if not _pod_is_connected:
        return
    # When the child ends, JAX would leave its coordinator in the parent's name, and wait for an
    # answer on a thread that the child does not have. The destructors of these objects would do the
    # same, so one reference is never released.
    jax_state = distributed.global_state
    for name in ("preemption_sync_manager", "client", "service"):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(getattr(jax_state, name)))
        setattr(jax_state, name, None)
    # JAX's handler of SIGTERM only wakes such a thread, so the signal would not end the child.
    if (handler := signal.getsignal(signal.SIGTERM)) is not None:
        signal.signal(signal.SIGTERM, handler)
    _members.clear()
    hosts.disconnect()
    _pod_is_connected = False


os.register_at_fork(
    before=_hold_sigterm, after_in_parent=_let_sigterm_come, after_in_child=_start_as_child
)


def require_initialize() -> None:
    """Raises RuntimeError where there are several processes and they are not connected."""
    if jax.process_count() > 1 and not _pod_is_connected:
        raise RuntimeError(
            f"freeio_jax: this program has {jax.process_count()} processes. Call "
            "freeio_jax.initialize() in each of them, after jax.distributed.initialize() and "
            "before the first dispatch or combine is compiled or loaded."
        )
