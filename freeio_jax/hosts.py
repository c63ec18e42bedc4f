"""Which host each device is on, and which groups of ranks span hosts.

A host is what the processes that can connect by abstract sockets have in common. The setting
``host_size`` makes *virtual hosts* of so many consecutive devices (``jax.devices()``), also within
one process. Everything then runs as between hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import jax
import numpy as np

from freeio_jax import settings


@dataclasses.dataclass(frozen=True)
class Host:
    """One host of a program of several processes.

    Attributes:
      number: hosts are numbered in the order of their first processes.
      name: its network name.
      processes: those of this host, in order.
    """

    number: int
    name: str
    processes: tuple[int, ...]

    def __str__(self):
        return f"host {self.number} ({self.name})"


@dataclasses.dataclass(frozen=True)
class _Connected:
    """What :func:`freeio_jax.initialize` has found."""

    hosts: tuple[Host, ...]
    host_size: int | None


_connected: _Connected | None = None


def connect(hosts: Iterable[Host]) -> None:
    """To be called when the processes are connected."""
    global _connected
    _connected = _Connected(tuple(hosts), settings.config()["host_size"])


def disconnect() -> None:
    global _connected
    _connected = None


def of_program() -> tuple[Host, ...]:
    """The hosts of a program of several processes; empty in one process, and before initialize."""
    return _connected.hosts if _connected is not None else ()


def virtual_host(devices: Sequence, process: int, host_size: int | None) -> int | None:
    """The number of the virtual host of a process, among ``devices`` of all processes.

    None: there are no virtual hosts.

    Raises:
      ValueError: the devices of the process are on several virtual hosts.
    """
    if host_size is None:
        return None
    numbers = {i // host_size for i, d in enumerate(devices) if d.process_index == process}
    if len(numbers) > 1:
        raise ValueError(
            f"freeio_jax: host_size={host_size} (FREEIO_HOST_SIZE) puts the devices of process "
            f"{process} on several virtual hosts. In a program of several processes it must be a "
            "multiple of the devices of a process."
        )
    return numbers.pop() if numbers else None


def in_order_of_rank(hosts: Iterable[Hashable]) -> tuple[int, ...]:
    """The hosts of a group's ranks, numbered in the order in which the ranks come to them."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(host, len(numbers)) for host in hosts)


def there_are_several() -> bool:
    """Whether some devices of the program are on different hosts."""
    if jax.process_count() > 1:
        _check_host_size()
        return len(of_program()) > 1
    host_size = settings.config()["host_size"]
    return host_size is not None and host_size < jax.device_count()


def _check_host_size() -> None:
    """Raises if the setting ``host_size`` has changed since the processes were connected."""
    host_size = settings.config()["host_size"]
    if _connected is not None and host_size != _connected.host_size:
        raise RuntimeError(
            f"freeio_jax: host_size was {_connected.host_size} when initialize() connected the "
            f"processes, and is {host_size} now. Set it before that call, alike in all processes "
            "(FREEIO_HOST_SIZE)."
        )


def of_devices(devices: Sequence) -> list[Hashable]:
    """What the devices of one host have in common, for each device.

    Raises:
      RuntimeError: the setting ``host_size`` has changed since the processes were connected.
    """
    host_size = settings.config()["host_size"]
    if jax.process_count() > 1:
        _check_host_size()
        number = {p: host.number for host in of_program() for p in host.processes}
        return [number.get(device.process_index) for device in devices]
    if host_size is None:
        return [0] * len(devices)
    position = {d: i for i, d in enumerate(jax.devices(devices[0].platform))}
    return [position[device] // host_size for device in devices]


def of_groups(mesh, groups: np.ndarray) -> np.ndarray | None:
    """The hosts of the ranks of each group, int64 ``[groups, R]``; None if no group spans hosts.

    Args:
      mesh: of the program that is being lowered.
      groups: mesh device indices ``[groups, R]``, in order of rank.

    Returns:
      In each group the hosts are numbered from 0 in the order of :func:`in_order_of_rank`.

    Raises:
      ValueError: the mesh has no devices, and the program has several hosts.
    """
    if groups.shape[1] == 1 or not there_are_several():
        return None
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(
            "freeio_jax: this program has several hosts, and the mesh has no devices here, so that "
            "nobody knows which ranks share a host. Call under jax.set_mesh(mesh), or pass "
            "mesh=... with a jax.sharding.Mesh to jax.shard_map."
        )
    of_device = of_devices(list(mesh.devices.flat))
    hosts = np.array(
        [in_order_of_rank(of_device[index] for index in group) for group in groups], np.int64
    )
    return hosts if hosts.any() else None
