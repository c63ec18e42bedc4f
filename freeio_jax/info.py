"""What this installation is and does: ``python -m freeio_jax.info``, or :func:`info`.

Several processes (of ``python -m freeio_jax.launch -n 4 -m freeio_jax.info``, or of srun) connect
first; process 0 tells of all, the others only what is wrong with them.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp

from freeio_jax import _native, cluster, hosts, nvshmem, runtime, settings, transport
from freeio_jax.engines import ENGINES
from freeio_jax.grouped_matmul import choice
from freeio_jax.grouped_matmul.product import Product

#: Platforms for which there are engines, as ``jax.default_backend()`` names them.
_ENGINE_PLATFORMS = tuple("gpu" if platform == "cuda" else platform for platform in ENGINES)

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def usage() -> dict[str, int]:
    """What the kernel holds for this process. None of it may grow from exchange to exchange."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    with open("/proc/self/maps") as maps:
        mappings = sum(1 for _ in maps)
    return {
        "resident MiB": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": mappings,
        "threads": len(os.listdir("/proc/self/task")),
    }


def _topology() -> str:
    """Which process has which devices, a line for each."""
    members = runtime.members()
    host_of = {p: host for host in hosts.of_program() for p in host.processes}
    lines = []
    for process in range(jax.process_count()):
        if process == jax.process_index():
            where = f" (pid {os.getpid()}, this one)" if jax.process_count() > 1 else ""
        elif members is None:
            where = " (not connected)"
        else:
            where = f" (pid {members[process]}, {host_of[process]})"
        devices = [str(d.id) for d in jax.devices() if d.process_index == process]
        lines.append(f"process {process}{where}: devices {', '.join(devices)}")
    return "\n".join(lines)


def _gpu_pairs() -> dict[bool, list[tuple[int, int]]]:
    """Pairs of this process's GPUs, as CUDA numbers them, by whether NVLink connects them."""
    ordinals = [device.local_hardware_id for device in jax.local_devices()]
    pairs = {True: [], False: []}
    for pair in itertools.permutations(ordinals, 2):
        pairs[_native.cuda.has_link(*pair)].append(pair)
    return pairs


def _has_gpu_engine() -> bool:
    return jax.default_backend() == "gpu" and "gpu" in _ENGINE_PLATFORMS


def _reach() -> str:
    """Which devices and processes can exchange rows, and how."""
    lines = []
    if _has_gpu_engine():
        pairs = _gpu_pairs()
        for possible, how in ((True, "NVLink"), (False, "NO NVLink")):
            if pairs[possible]:
                lines.append(f"{how}: GPUs {', '.join(f'{a}->{b}' for a, b in pairs[possible])}")
    if not lines:
        lines.append("devices of one process: directly")
    how = "by mapping each other's memory" if _has_gpu_engine() else "by process_vm_readv"
    for host in hosts.of_program():
        here = jax.process_index() in host.processes
        if len(host.processes) > 1:
            tried = ", which was tried" if here else ""
            lines.append(f"processes {[*host.processes]} of {host}: {how}{tried}")
    if len(hosts.of_program()) > 1:
        lines.append(f"between hosts: {_between_hosts()}")
    if runtime.members() is None and jax.process_count() > 1:
        lines.append("other processes: not, before freeio_jax.initialize()")
    return "\n".join(lines)


def _between_hosts() -> str:
    """What carries rows between hosts, and why nothing faster does."""
    backend = jax.default_backend()
    carrier = transport.choose("cuda" if backend == "gpu" else backend)
    if isinstance(carrier, transport.Nvshmem):
        return nvshmem.describe(nvshmem.state())
    return f"{carrier.name}: {carrier.why}"


def _grouped_matmul(backend: str) -> str:
    """What multiplies the rows of experts, a line for each product."""
    platform = "cuda" if backend == "gpu" else backend
    chosen = {p: choice.choose(platform, p, jnp.bfloat16) for p in Product}
    return "\n".join(
        f"{p.value}: {choice.version(c.implementation.name)} ({c.reason})"
        for p, c in chosen.items()
    )


def _memory() -> str:
    """What the engine owns or has mapped, and what this process holds."""
    if _has_gpu_engine():
        owned, mapped = _native.cuda.memory()
        engine = f"the engine owns {owned} bytes of each GPU"
        if mapped:
            engine += f" and has mapped {mapped >> 20} MiB of the other processes' GPUs"
    else:
        engine = "the engine owns no buffers and maps nothing: rows are read where they lie"
    held = ", ".join(f"{value} {name}" for name, value in usage().items())
    return f"{engine}\nthis process: {held}"


def _reading_is_forbidden() -> str | None:
    """Why processes of this user may not read each other's memory here; None if they may."""
    scope = int(_YAMA.read_text()) if _YAMA.exists() else 0
    if scope > 1:
        return (
            f"{_YAMA} is {scope}: processes may not read each other's memory, so exchanges between "
            "processes are impossible. `sysctl kernel.yama.ptrace_scope=1` allows them"
        )
    # A process may always read its own memory, unless a filter forbids the system call.
    libc = ctypes.CDLL(None, use_errno=True)
    source, target = ctypes.create_string_buffer(b"x"), ctypes.create_string_buffer(1)
    spans = [(ctypes.c_size_t * 2)(ctypes.addressof(b), 1) for b in (target, source)]
    arguments = (os.getpid(), spans[0], ctypes.c_ulong(1), spans[1], ctypes.c_ulong(1))
    if libc.process_vm_readv(*arguments, ctypes.c_ulong(0)) == 1:
        return None
    return (
        f"process_vm_readv: {os.strerror(ctypes.get_errno())}. A seccomp profile forbids it, most "
        "likely: exchanges between processes are impossible in this container. Start it with "
        "--cap-add=SYS_PTRACE, or a profile that allows process_vm_readv"
    )


def _problems() -> list[str]:
    """What is wrong with the set-up, and what to do."""
    problems = []
    backend = jax.default_backend()
    if backend not in _ENGINE_PLATFORMS:
        remedy = (
            "build it where nvcc is found (`pip install --force-reinstall --no-deps .`)"
            if backend == "gpu"
            else "set JAX_PLATFORMS=cpu"
        )
        problems.append(
            f"no engine for {backend} in this installation, only for "
            f"{', '.join(_ENGINE_PLATFORMS)}: {remedy}, or use freeio_jax.reference, which has the "
            "same contract"
        )
    if backend == "cpu" and Path("/dev/nvidiactl").exists() and not os.environ.get("JAX_PLATFORMS"):
        problems.append(
            "there is an NVIDIA driver, but JAX uses the CPU: pip install 'jax[cuda13]', and see "
            "what `python -c 'import jax; jax.devices(\"cuda\")'` says"
        )
    if backend == "cpu" and jax.device_count() == 1:
        problems.append(
            "one CPU device, so nothing is exchanged: for more set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 before JAX starts"
        )
    if _has_gpu_engine() and (apart := _gpu_pairs()[False]):
        problems.append(
            f"no NVLink between GPUs {', '.join(f'{a}->{b}' for a, b in apart)}, or peer access is "
            "off: leave some out (CUDA_VISIBLE_DEVICES), or use freeio_jax.reference"
        )
    if jax.process_count() == 1 and (launched := cluster.num_processes()) > 1:
        problems.append(
            f"the launcher started {launched} processes, but jax.distributed.initialize() was not "
            "called: each of them runs alone"
        )
    if jax.process_count() > 1:
        if runtime.members() is None:
            problems.append(
                "freeio_jax.initialize() was not called, or failed, in this program of "
                f"{jax.process_count()} processes: call it after jax.distributed.initialize()"
            )
        if backend == "cpu" and (forbidden := _reading_is_forbidden()):
            problems.append(forbidden)
    return problems


def info() -> dict[str, str]:
    """What this installation is and does, as ``{topic: words}``. Starts JAX's backend.

    >>> from freeio_jax.info import info
    >>> list(info())
    ['versions', 'engine', 'grouped matmul', 'devices', 'topology', 'reach', 'memory', 'settings', \
'problems']
    """
    packages = ("freeio_jax", "jax", "jaxlib", "flax", "tokamax")
    versions = [f"Python {platform.python_version()}", *(f"{p} {_version(p)}" for p in packages)]
    devices = jax.devices()
    backend = jax.default_backend()
    all_settings = (
        f"{name}={value} (config({name}=...) or FREEIO_{name.upper()})"
        for name, value in settings.config().items()
    )
    return {
        "versions": ", ".join(versions),
        "engine": f"native, for {backend}" if backend in _ENGINE_PLATFORMS else "none",
        "grouped matmul": _grouped_matmul(backend),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({backend}), "
        f"{jax.process_count()} process(es)",
        "topology": _topology(),
        "reach": _reach(),
        "memory": _memory(),
        "settings": ", ".join(all_settings),
        "problems": "\n".join(_problems()) or "none found",
    }


def _connect() -> list[str]:
    """Connects the processes that a launcher has started; returns what went wrong with that."""
    if cluster.num_processes() == 1:
        return []
    try:
        jax.distributed.initialize()
        runtime.initialize()
    except Exception as error:  # whatever it is, the rest is worth printing
        return [f"{type(error).__name__}: {error}"]
    return []


def _print(told: dict[str, str], process: str = "") -> None:
    for topic, words in told.items():
        first, *rest = words.splitlines()
        print(f"{process}{topic + ':':16}{first}", *rest, sep=f"\n{'':16}", flush=True)


def main() -> None:
    trouble = _connect()
    told = info()
    if trouble:
        told["problems"] = "\n".join([*trouble, *_problems()])
    if jax.process_index() == 0:
        _print(told)
    elif told["problems"] != "none found":
        _print({"problems": told["problems"]}, f"process {jax.process_index()}: ")


if __name__ == "__main__":
    main()
