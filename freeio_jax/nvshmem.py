"""NVSHMEM, which carries rows between hosts on GPUs.

:func:`freeio_jax.initialize` starts it by nvshmem4py where a program has several hosts. Its PEs are
the processes, which must have one GPU each. NVSHMEM's own calls that wait for other PEs have no
bound, so they run on a thread of their own, and only here.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from freeio_jax import _native, hosts, layout, log, runtime, settings
from freeio_jax.bootstrap import BootstrapError, Store
from freeio_jax.engines import ENGINES

#: What is installed for it.
EXTRA = "pip install 'freeio_jax[hosts]'"

#: Between two looks at whether all processes are done.
_LOOK_SECONDS = 0.02

#: How long a process waits at its end for the others, and for NVSHMEM.
_END_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class State:
    """What became of NVSHMEM in this program.

    Attributes:
      why_not: why it does not carry rows; empty: it does.
      version: of NVSHMEM and nvshmem4py, in words.
    """

    why_not: str = ""
    version: str = ""


_NOT_ASKED = State(why_not="freeio_jax.initialize() was not called.")
_state = _NOT_ASKED
_is_started = False  # in this process, where it stays started
_joined_hosts = False
_has_loss = False  # of another process, which has ended without leaving
_ending: _Ending | None = None  # where NVSHMEM uses the network in some process


def state() -> State:
    return _state


class _Ending:
    """A thread that runs something when the process ends. Python starts no thread then.

    Args:
      body: what it runs. It may wait for the other processes, without a bound.
    """

    def __init__(self, body: Callable[[], None]):
        self._is_due, self._is_over = threading.Event(), threading.Event()
        self._body = body
        threading.Thread(target=self._run, name="freeio_jax end", daemon=True).start()

    def _run(self) -> None:
        self._is_due.wait()
        try:
            self._body()
        except Exception as error:  # whatever it is, the process ends
            log.logger.warning("NVSHMEM has not ended in order: %s", error)
        self._is_over.set()

    def run(self, seconds: float) -> bool:
        """Runs it, and returns whether it was over in time."""
        self._is_due.set()
        return self._is_over.wait(seconds)


def _local_gpus() -> list[jax.Device]:
    """The GPUs of this process; none where programs run on something else."""
    has_engine = jax.default_backend() == "gpu" and "cuda" in ENGINES
    return jax.local_devices(backend="cuda") if has_engine else []


def _import() -> tuple[Any, str]:
    """nvshmem4py, and the versions of it and of NVSHMEM's library, or raises ImportError."""
    nvshmem = importlib.import_module("nvshmem.core")
    version = nvshmem.get_version()
    return nvshmem, (
        f"NVSHMEM {version.libnvshmem_version} (nvshmem4py {version.nvshmem4py_version})"
    )


def _obstacle() -> tuple[str, str]:
    """(why NVSHMEM cannot be started in this process, or "", and its version)."""
    if settings.config()["transport"] == "xla":
        return "transport=xla (FREEIO_TRANSPORT) says so", ""
    if not hasattr(_native, "hosts"):
        return (
            "freeio_jax was built without NVSHMEM: pip install nvidia-nvshmem-cu13, and then "
            "build freeio_jax again",
            "",
        )
    try:
        _, version = _import()
    except Exception as error:  # whatever is wrong with that installation, the program can go on
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"nvshmem4py cannot be loaded ({reason}): {EXTRA}", ""
    return "", version


def _who(process: int) -> str:
    """A process in words, with its host."""
    host = next(host for host in hosts.of_program() if process in host.processes)
    return f"process {process} (pid {_pids()[process]}) on {host}"


def _pids() -> dict[int, int]:
    return {**(runtime.members() or {}), jax.process_index(): os.getpid()}


def _all_do(store: Store, step: str, run: Callable[[], None]) -> None:
    """Runs something that waits for the other processes; all of them must call it.

    Raises:
      BootstrapError: it failed in some process, or did not end in all of them in time. The error
        names them.
    """

    def body():
        try:
            run()
        except Exception as error:  # the others have to know of it, whatever it is
            store.tell(step, f"{type(error).__name__}: {error}")
        else:
            store.tell(step, "")

    threading.Thread(target=body, name=f"freeio_jax {step}", daemon=True).start()
    while True:
        told = store.told(step)
        for process, error in sorted(told.items()):
            if error:
                raise BootstrapError(
                    f"freeio_jax.initialize: {_who(process)} could not {step}: {error} "
                    "NVSHMEM_DEBUG=INFO makes NVSHMEM say more. FREEIO_TRANSPORT=xla does without "
                    "it."
                )
        late = sorted(set(_pids()) - set(told))
        if not late:
            return
        if time.monotonic() > store.deadline:
            names = ", ".join(map(_who, late))
            raise BootstrapError(
                f"freeio_jax.initialize: {names} did not {step} within {store.timeout:g} s. All "
                "hosts must reach each other in the network that NVSHMEM uses "
                "(NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME names it). FREEIO_TRANSPORT=xla does without "
                "NVSHMEM."
            )
        time.sleep(_LOOK_SECONDS)


def _why_not(offers: dict[int, dict]) -> str:
    """Why NVSHMEM cannot be started in all processes, or ""."""
    for process, offer in sorted(offers.items()):
        if offer["obstacle"]:
            return f"{_who(process)}: {offer['obstacle']}."
    others = [
        f"{_who(process)} has {offer['gpus']} GPUs"
        for process, offer in sorted(offers.items())
        if offer["gpus"] != 1
    ]
    if others:
        return (
            f"NVSHMEM needs a process for each GPU, and {'; '.join(others)}. "
            "`python -m freeio_jax.launch` starts processes so."
        )
    return ""


def _agree(offers: dict[int, dict]) -> State | None:
    """What follows from the offers of all processes; None: NVSHMEM can be started.

    Raises:
      BootstrapError: they have different versions of NVSHMEM, or the setting ``transport`` asks for
        it and it cannot be started.
    """
    if why := _why_not(offers):
        if settings.config()["transport"] == "nvshmem":
            raise BootstrapError(
                "freeio_jax.initialize: transport=nvshmem (FREEIO_TRANSPORT) asks for NVSHMEM, "
                f"which cannot be started. {why}"
            )
        return State(why_not=why)
    first, *others = sorted(offers)
    for process in others:
        version, expected = offers[process]["version"], offers[first]["version"]
        if version != expected:
            raise BootstrapError(
                f"freeio_jax.initialize: {_who(first)} has {expected}, and {_who(process)} has "
                f"{version}: all processes need the same. Or set FREEIO_TRANSPORT=xla in all of "
                "them, which does without."
            )
    return None


def _set_device(ordinal: int) -> Any:
    """Sets the calling thread's GPU, which NVSHMEM's own calls need, and returns it."""
    from cuda.core import Device

    device = Device(ordinal)
    device.set_current()
    return device


def _start(store: Store, version: str) -> None:
    """Starts NVSHMEM in all processes."""
    global _is_started
    me, num_processes = jax.process_index(), jax.process_count()
    ordinal = _local_gpus()[0].local_hardware_id
    # Kernels use no multicast of NVLink, which NVSHMEM would prepare.
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
    # Where NVLink reaches all PEs, NVSHMEM's thread would only wait for calls that no kernel makes.
    # It keeps a core busy, and goes on reading CUDA's memory while the process ends.
    os.environ.setdefault("NVSHMEM_DISABLE_LOCAL_ONLY_PROXY", "1")
    part_bytes = layout.window_part_bytes(len(hosts.of_program()))
    landing = _native.hosts.landing_bytes(num_processes, len(hosts.of_program()), part_bytes)
    os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(layout.symmetric_heap_bytes(landing)))
    nvshmem, _ = _import()
    unique_id = nvshmem.get_unique_id(empty=me != 0)
    its_bytes = unique_id._data.view(np.int8)
    told = store.publish("id", its_bytes.tobytes().hex() if me == 0 else "")
    its_bytes[...] = np.frombuffer(bytes.fromhex(told[0]), np.int8).reshape(its_bytes.shape)

    def start():
        nvshmem.init(
            device=_set_device(ordinal),
            uid=unique_id,
            rank=me,
            nranks=num_processes,
            initializer_method="uid",
        )

    began = time.monotonic()
    _all_do(store, "start NVSHMEM", start)
    _is_started = True
    log.logger.info("%s has started in %.3f s", version, time.monotonic() - began)


def _make_memory(store: Store) -> None:
    """Makes the symmetric memory in all processes."""
    program = hosts.of_program()
    host_of = {process: host for host in program for process in host.processes}
    numbers = {d.process_index: n for d, n in ENGINES["cuda"].numbers().items()}
    processes = range(jax.process_count())
    _all_do(
        store,
        "make NVSHMEM's symmetric memory",
        lambda: _native.hosts.join(
            jax.process_index(),
            _local_gpus()[0].local_hardware_id,
            [host_of[process].number for process in processes],
            [numbers.get(process, -1) for process in processes],
            layout.window_part_bytes(len(program)),
        ),
    )


def _try_network(store: Store) -> None:
    """Sends something by the network, where processes need it."""
    device = _local_gpus()[0]

    def send():
        array = jax.device_put(np.zeros(1 << 20, np.uint8), device)
        array.block_until_ready()
        _native.hosts.try_network(array.unsafe_buffer_pointer(), array.size)

    _all_do(store, "reach the other hosts by NVSHMEM", send)


def _join() -> None:
    """Called when the processes are connected: starts NVSHMEM if there are several hosts."""
    global _state, _joined_hosts, _ending
    gpus = _local_gpus()
    if not gpus or len(hosts.of_program()) < 2:
        _state = State(why_not="this program has no GPUs on several hosts.")
        return
    obstacle, version = _obstacle()  # to import nvshmem4py may take long
    store = runtime.store("nvshmem")
    offers = store.publish("offer", {"obstacle": obstacle, "version": version, "gpus": len(gpus)})
    decided = _agree(offers)
    if decided is None:
        if not _is_started:
            _start(store, version)
        _make_memory(store)
        _joined_hosts = True
        _try_network(store)
        decided = State(version=version)
        log.logger.info("between hosts: %s", describe(decided))
        _, by_network, _ = _native.hosts.reach()
        uses_network = store.publish("uses network", bool(by_network))
        if any(uses_network.values()) and _ending is None:
            _ending = _prepare_end()
    _state = decided


def _leave() -> None:
    global _state, _joined_hosts, _has_loss
    if _joined_hosts:
        _has_loss |= not _native.hosts.leave()
    _state, _joined_hosts = _NOT_ASKED, False


def _prepare_end() -> _Ending:
    ordinal = _local_gpus()[0].local_hardware_id
    nvshmem, _ = _import()

    def finalize():
        _set_device(ordinal)
        nvshmem.finalize()

    return _Ending(finalize)


def _end() -> None:
    """Ends NVSHMEM at the end of the process, where it uses the network.

    Its threads for the network would go on while the process ends, and may crash it. NVSHMEM's own
    end waits for all PEs. So it begins only if all processes have come to this in order.
    """
    global _ending
    ending, _ending = _ending, None
    if ending is None:
        return
    store = runtime.store("nvshmem", at_most=_END_SECONDS)
    if not _all_end(store):
        log.logger.info("not all processes end in order, so NVSHMEM is left as it is")
    elif not ending.run(store.timeout):
        log.logger.warning("NVSHMEM has not ended within %g s", store.timeout)


def _all_end(store: Store) -> bool:
    """Whether all processes end in order and in time, and have told each other that they do."""
    try:
        store.tell("end", not _has_loss and not ENGINES["cuda"].has_failed)
        # Nobody waits for the others if one has failed: its peers may not come.
        while all((told := store.told("end")).values()) and time.monotonic() < store.deadline:
            if len(told) == jax.process_count():
                # Comes back only if all others are here, too.
                store.publish("all end", True)
                return True
            time.sleep(_LOOK_SECONDS)
    except RuntimeError as error:  # some process has given up before, or is gone
        log.logger.debug("%s", error)
    return False


def describe(it: State) -> str:
    """How NVSHMEM carries rows between hosts, in words."""
    by_link, by_network, symmetric_bytes = _native.hosts.reach()
    ways = [
        f"{how} to process(es) {', '.join(map(str, processes))}"
        for how, processes in (("NVLink", by_link), ("network", by_network))
        if processes
    ]
    return f"{it.version}, {' and '.join(ways)}; {symmetric_bytes} bytes of symmetric memory"


runtime.add_pod_member(runtime.PodMember(_join, _leave, _end))
