"""What a dispatch returns: the packed rows, the size of each group, and the way back."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from freeio_jax.layout import Layout


class Routes(NamedTuple):
    """Where the rows of a dispatch went: the arrays of a handle that an exchange along it needs.

    Attributes:
      dest_rank: int32 ``[T, K]``, at the source: rank that hosts the assignment's expert; -1: no
        row.
      dest_row: int32 ``[T, K]``, at the source: the assignment's row on that rank; -1: no row.
      row_source: int32 ``[capacity]``, at the experts: ``source_rank * T*K + t*K + k`` of each
        packed row; -1: padding.
    """

    dest_rank: Any
    dest_row: Any
    row_source: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Handle:
    """The way back of one dispatch: a pytree, good for any number of ``combine`` calls.

    Opaque but for three fields and :meth:`has_row`.

    Attributes:
      expert_load: int32 ``[E/R]``: assignments routed to each local expert, before any drop.
      num_dropped: int32 scalar: assignments to this rank's experts that did not fit.
      num_invalid: int32 scalar: this rank's expert ids outside ``[-1, E)``.
    """

    expert_load: jax.Array
    num_dropped: jax.Array
    num_invalid: jax.Array
    # The fields of `Routes`, in its order.
    _dest_rank: jax.Array
    _dest_row: jax.Array
    _row_source: jax.Array
    _layout: Layout = dataclasses.field(metadata={"static": True})
    _axis_name: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def has_row(self) -> jax.Array:
        """Bool ``[T, K]``: which of this rank's own assignments have a packed row.

        It is false for an id outside ``[0, E)``, and for an assignment that did not fit in the
        capacity of its expert's rank.
        """
        return self._dest_row >= 0

    @property
    def _routes(self) -> Routes:
        return Routes(self._dest_rank, self._dest_row, self._row_source)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatched:
    """Result of ``dispatch``.

    Attributes:
      tokens: ``[capacity, ...]`` for each leaf: rows packed expert-major, zero past the end.
      group_sizes: int32 ``[E/R]``: rows of each local expert, what ``lax.ragged_dot`` takes.
      handle: pass it to ``combine``.
    """

    tokens: Any
    group_sizes: jax.Array
    handle: Handle

    def expert_of_row(self) -> jax.Array:
        """The expert of each packed row: int32 ``[capacity]``, for products that ask for it.

        Experts are numbered as in ``group_sizes``: ``0`` to ``E/R - 1`` on every rank. The rows
        that ``alignment`` adds to a group have the group's expert. Rows past
        ``sum(group_sizes)`` have ``E/R``, which is no expert: ``jax.nn.one_hot`` makes zeros of it,
        and ``.at[...].add`` and ``jax.ops.segment_sum`` leave such rows out.

        >>> import jax, jax.numpy as jnp, freeio_jax as fio
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
        >>> def expert_of_row(tokens, topk_idx):
        ...     out = fio.dispatch(tokens, topk_idx, num_experts=3, axis_name="expert", alignment=2)
        ...     return out.expert_of_row()
        >>> call = jax.shard_map(expert_of_row, mesh=mesh, in_specs=P(), out_specs=P("expert"))
        >>> jax.jit(call)(jnp.ones((3, 1)), jnp.array([[2], [0], [0]])).tolist()
        [0, 0, 2, 2, 3, 3]
        """
        capacity = jax.tree.leaves(self.tokens)[0].shape[0]
        ends = jnp.cumsum(self.group_sizes, dtype=jnp.int32)
        row = jnp.arange(capacity, dtype=jnp.int32)
        return jnp.sum(ends[None] <= row[:, None], axis=1, dtype=jnp.int32)
