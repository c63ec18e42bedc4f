"""What carries rows between hosts: :func:`choose`, and :class:`XlaCollectives`.

An engine moves rows within a host. Where a group spans hosts, a transport lowers the operation
instead.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib.mlir.dialects import hlo

from freeio_jax import log, plain
from freeio_jax.define import split_routes


class XlaCollectives:
    """XLA's own collectives, by the code of :mod:`freeio_jax.reference`.

    Attributes:
      name: for the log and ``info``.
      why: why nothing faster serves.
    """

    name = "XLA's collectives"

    def __init__(self, why: str):
        self.why = why

    def lower(
        self, ctx, *operands, operation, meet, device_index, axes, layout, groups, hosts, **params
    ):
        """Lowers an operation of the groups of a call that spans hosts.

        Args:
          ctx: JAX's lowering context.
          operands: of the operation's primitive.
          operation: its name.
          meet: None, or ``meet(ctx, value)``: makes a custom call that returns ``value`` when all
            ranks of the group have come. XLA's collectives of a rank that waits for another one
            hang for long, and do not say for whom. So none begins before all are there.
          device_index: makes the MLIR value of this device's index in the mesh, and its aval.
          axes, layout, params: of the primitive.
          groups: mesh device indices, ``[groups, R]``.
          hosts: of the ranks of each group, as :func:`freeio_jax.hosts.of_groups` returns them.
        """
        self._log_once()
        operands = list(operands)
        # All that is sent depends on the first operand: the ids, or to which ranks rows went.
        if meet is not None:
            operands[0] = meet(ctx.replace(avals_in=ctx.avals_in[:1]), operands[0])
        run = functools.partial(getattr(plain, operation), axes=axes, layout=layout, **params)
        if operation == "combine" and (hosts == hosts[0]).all():
            run = functools.partial(run, hosts=hosts[0])
        elif operation == "combine":
            run = functools.partial(_run_with_hosts_of_group, run, _by_device(groups, hosts))
            index, index_aval = device_index()
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


@functools.cache
def choose(platform: str) -> XlaCollectives:
    """What carries rows between hosts, for the devices of a platform as the lowering names it."""
    if platform == "cpu":
        return XlaCollectives("on CPU there is nothing faster.")
    return XlaCollectives("this installation has no transport between hosts for GPUs.")
