"""What carries rows between hosts: :func:`choose`, :class:`Nvshmem`, :class:`XlaCollectives`.

An engine moves rows within a host. Where a group spans hosts, a transport lowers the operation
instead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib.mlir.dialects import hlo

from freeio_jax import hosts, log, nvshmem, plain
from freeio_jax.define import split_routes
from freeio_jax.engines import CudaEngineBetweenHosts


@dataclasses.dataclass(frozen=True)
class SpanningCall:
    """A call of an operation whose groups span hosts.

    Attributes:
      operation: its name.
      lowering: lowers it to a custom call of an engine.
      engine: that of the platform.
      meet: None, or ``meet(ctx, value)``: makes a custom call that returns ``value`` when all ranks
        of the group have come. XLA's collectives of a rank that waits for another one hang for
        long, and do not say for whom. So none begins before all are there.
      device_index: makes the MLIR value of this device's index in the mesh, and its aval.
      groups: mesh device indices, ``[groups, R]``.
      hosts: of the ranks of each group, as :func:`freeio_jax.hosts.of_groups` returns them.
    """

    operation: str
    lowering: Callable
    engine: Any
    meet: Callable | None
    device_index: Callable
    groups: np.ndarray
    hosts: np.ndarray


class XlaCollectives:
    """XLA's own collectives, by the code of :mod:`freeio_jax.reference`.

    Attributes:
      name: for the log and ``info``.
      why: why nothing faster serves.
    """

    name = "XLA's collectives"

    def __init__(self, why: str):
        self.why = why

    def lower(self, ctx, *operands, call: SpanningCall, axes, layout, **params):
        """Lowers an operation of the groups of a call that spans hosts.

        Args:
          ctx: JAX's lowering context.
          operands: of the operation's primitive.
          call: the rest.
          axes, layout, params: of the primitive.
        """
        self._log_once()
        operands = list(operands)
        # All that is sent depends on the first operand: the ids, or to which ranks rows went.
        if call.meet is not None:
            operands[0] = call.meet(ctx.replace(avals_in=ctx.avals_in[:1]), operands[0])
        run = functools.partial(getattr(plain, call.operation), axes=axes, layout=layout, **params)
        if call.operation == "combine" and (call.hosts == call.hosts[0]).all():
            run = functools.partial(run, hosts=call.hosts[0])
        elif call.operation == "combine":
            run = functools.partial(
                _run_with_hosts_of_group, run, _by_device(call.groups, call.hosts)
            )
            index, index_aval = call.device_index()
            operands.append(index)
            ctx = ctx.replace(avals_in=[*ctx.avals_in, index_aval])
        lower = mlir.lower_fun(run, multiple_results=ctx.primitive.multiple_results)
        return [_mark_as_complete(result) for result in lower(ctx, *operands)]

    @functools.cache  # noqa: B019 - there is one for each platform
    def _log_once(self) -> None:
        log.logger.warning(
            "this program has expert groups that span hosts. %s carry their rows: %s",
            self.name,
            self.why,
        )


def _mark_as_complete(value):
    """The value, as the result of an operation that changes nothing.

    ``overlap/calls.py`` looks at what has made a value. A function that was called could have made
    an exchange that is still under way.
    """
    return hlo.reshape(value.type, value)


def _by_device(groups, hosts):
    """The hosts of each mesh device's group: int32 ``[devices, R]``."""
    of_device = np.zeros((groups.size, groups.shape[1]), np.int32)
    of_device[groups] = hosts[:, None]
    return of_device


def _run_with_hosts_of_group(run, hosts_of_device, *operands):
    *operands, device_index = operands
    return run(*operands, hosts=jnp.asarray(hosts_of_device)[device_index])


def describe_rows(operation: str, avals) -> str:
    """What the ranks of one exchange must have in common, beside the layout: dtypes and shapes."""
    if operation == "dispatch":
        leaves = avals[1:]
    else:
        _, leaves = split_routes(avals)
    texts = [f"{leaf.dtype}{list(leaf.shape[1:])}" for leaf in leaves]
    return f"rows: {' '.join(texts)}".replace(", ", ",")


class Nvshmem:
    """Kernels of the CUDA engine that put rows to other hosts by NVSHMEM.

    Attributes: as those of :class:`XlaCollectives`.
    """

    name = "NVSHMEM"
    why = ""

    def lower(self, ctx, *operands, call: SpanningCall, axes, layout, **params):
        """As :meth:`XlaCollectives.lower`. What starts an exchange runs to its end, too."""
        engine = CudaEngineBetweenHosts(call.engine)
        return call.lowering(ctx, *operands, engine=engine, axes=axes, layout=layout, **params)


def choose(platform: str, mesh=None, groups=None) -> XlaCollectives | Nvshmem:
    """What carries rows between hosts.

    Args:
      platform: of the devices, as the lowering names it.
      mesh: of the program, if it is known.
      groups: mesh device indices ``[groups, R]``, in order of rank.
    """
    if platform == "cpu":
        return _by_xla("on CPU there is nothing faster.")
    if jax.process_count() == 1:
        return _by_xla("NVSHMEM takes one GPU of a process, and here one process has all of them.")
    state = nvshmem.state()
    if state.why_not:
        return _by_xla(state.why_not)
    if mesh is not None and (why_not := _misfit(mesh, groups)):
        return _by_xla(why_not)
    return Nvshmem()


@functools.cache
def _by_xla(why: str) -> XlaCollectives:
    return XlaCollectives(why)


def _misfit(mesh, groups) -> str:
    """Why the kernels cannot serve the groups of a mesh; empty: they can."""
    devices = list(mesh.devices.flat)
    host = {p: h for h in hosts.of_program() for p in h.processes}
    for group in groups:
        processes = [devices[index].process_index for index in group]
        of_host: dict = {}
        for process in processes:
            of_host.setdefault(host[process].number, []).append(
                host[process].processes.index(process)
            )
        first, *others = of_host.values()
        if any(numbers != first for numbers in others):
            return (
                f"a group has processes {processes}, in order of rank. NVSHMEM serves groups that "
                "have the same processes, in the same order, on each of their hosts, counted "
                "within the host."
            )
    return ""
