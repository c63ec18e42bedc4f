"""What a dispatch returns: the packed rows, the size of each group, and the way back."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

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

    Opaque but for three fields.

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

    @property
    def _routes(self) -> Routes:
        return Routes(self._dest_rank, self._dest_row, self._row_source)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatched:
    """Result of ``dispatch``.

    Attributes:
      tokens: ``[capacity, ...]`` for each leaf: rows packed expert-major. Past the end they are
        zero, or with ``zero_tail=False`` anything.
      group_sizes: int32 ``[E/R]``: rows of each local expert, what ``lax.ragged_dot`` takes.
      handle: pass it to ``combine``.
    """

    tokens: Any
    group_sizes: jax.Array
    handle: Handle
