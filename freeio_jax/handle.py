"""What a dispatch returns: the packed rows' geometry and the way back for combine."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from freeio_jax.layout import Layout


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
    # Source side, [T, K]: rank that hosts the assignment's expert, and the row there; -1: no row.
    _dest_rank: jax.Array
    _dest_row: jax.Array
    # Expert side, [capacity]: source_rank * T*K + t*K + k of each packed row; -1: padding.
    _row_source: jax.Array
    _layout: Layout = dataclasses.field(metadata={"static": True})
    _axis_name: tuple[str, ...] = dataclasses.field(metadata={"static": True})


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
