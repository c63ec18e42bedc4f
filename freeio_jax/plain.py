"""The four operations in plain ``jax.lax``, on the arrays of a handle.

The exchange that everyone writes today: rows are gathered into one fixed-size slot per
(destination, assignment), sent with a dense ``lax.all_to_all``, and gathered again. Each function
takes the operands of a primitive and returns its results, in the same order (``primitives.py``).
:mod:`freeio_jax.reference` is made of them, and so are the exchanges of groups that span hosts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax.define import split_routes
from freeio_jax.dtypes import accumulator_dtype
from freeio_jax.handle import Routes
from freeio_jax.layout import Layout


def route(topk_idx: jax.Array, layout: Layout):
    """Where every assignment of every rank goes. No communication: all ids are here.

    Args:
      topk_idx: int32 ``[R, T, K]``, the ids of all ranks in order.

    Returns:
      dest_rank, dest_row: int32 ``[R, T, K]``; -1 where the assignment gets no row.
      expert_load: int32 ``[R, E/R]`` of every rank's experts.
    """
    ids = topk_idx.reshape(-1)
    valid = (ids >= 0) & (ids < layout.num_experts)
    # Invalid ids go behind the last expert, so that the stable sort leaves them past every row.
    expert = jnp.where(valid, ids, layout.num_experts)
    load = jnp.zeros(layout.num_experts + 1, jnp.int32).at[expert].add(1)
    order = jnp.argsort(expert, stable=True)
    sorted_expert = expert[order]
    first = jnp.cumsum(load) - load
    within = jnp.arange(ids.size, dtype=jnp.int32) - first[sorted_expert]
    load = load[:-1].reshape(layout.num_ranks, layout.experts_per_rank)
    starts = jnp.append(layout.group_starts(load).reshape(-1), 0)
    row = jnp.zeros_like(ids).at[order].set(within + starts[sorted_expert])
    kept = valid & (row < layout.capacity)
    dest_rank = jnp.where(kept, expert // layout.experts_per_rank, -1)
    dest_row = jnp.where(kept, row, -1)
    return dest_rank.reshape(topk_idx.shape), dest_row.reshape(topk_idx.shape), load


# --- Rows that move ------------------------------------------------------------------------------


def _by_bits(move, rows, *how):
    """``move(rows, *how)``, where ``move`` copies elements; its derivative is that of ``move``.

    The elements travel as unsigned integers. XLA for the CPU may convert bfloat16 to float32 for a
    collective, or float8 to float16 for a select. Then subnormal numbers would become zeros, and
    signaling NaNs quiet ones.
    """

    @jax.custom_jvp
    def moved(rows, *how):
        if not jnp.issubdtype(rows.dtype, jnp.floating):
            return move(rows, *how)
        bits = lax.bitcast_convert_type(rows, jnp.dtype(f"uint{rows.dtype.itemsize * 8}"))
        return lax.bitcast_convert_type(move(bits, *how), rows.dtype)

    @moved.defjvp
    def _(primals, tangents):
        return moved(*primals), move(tangents[0], *primals[1:])

    return moved(rows, *how)


def _exchange(rows, axes):
    exchange = functools.partial(
        lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True
    )
    return _by_bits(exchange, rows)


def _take(rows, index):
    """``rows[index]``, with zeros where ``index`` is negative; so is its derivative there."""

    def take(rows, index):
        taken = jnp.take(rows, jnp.maximum(index, 0), axis=0, mode="clip")
        return jnp.where(_column(index >= 0, taken), taken, jnp.zeros((), rows.dtype))

    return _by_bits(take, rows, index)


def _column(x, rows):
    """``x``, with a value for each row, so that it can be multiplied with ``rows``."""
    return x.reshape(x.shape + (1,) * (rows.ndim - x.ndim))


def _slots(dest_rank, rank):
    """Slot of each assignment in the buffer between its source and ``rank``: order of (t, k)."""
    to_rank = dest_rank == rank
    return jnp.cumsum(to_rank, axis=-1, dtype=jnp.int32) - 1, to_rank


class _Slots(NamedTuple):
    """Where rows lie in the buffers of ``R * T*K`` slots that ranks exchange; -1: nowhere.

    Attributes:
      assignment: int32 ``[R, T*K]``, at the source: the assignment of each slot to each rank.
      of_assignment: int32 ``[T, K]``, at the source: the inverse.
      row: int32 ``[R * T*K]``, at the experts: the packed row of each slot.
      of_row: int32 ``[capacity]``, at the experts: the inverse.
    """

    assignment: jax.Array
    of_assignment: jax.Array
    row: jax.Array
    of_row: jax.Array

    @classmethod
    def of(cls, routes: Routes, dest_rank_of_all, layout: Layout, axes):
        """``dest_rank_of_all``: int32 ``[R, T*K]``, the ``dest_rank`` of all ranks."""
        num_ranks, num_sent = layout.num_ranks, layout.num_assignments
        mine = routes.dest_rank.reshape(1, -1)
        ranks = jnp.arange(num_ranks, dtype=jnp.int32)[:, None]
        slot, to_rank = _slots(mine, ranks)
        number = jnp.broadcast_to(jnp.arange(num_sent, dtype=jnp.int32), slot.shape)
        assignment = (
            jnp.full(slot.shape, -1, jnp.int32)
            .at[ranks, jnp.where(to_rank, slot, num_sent)]
            .set(number, mode="drop")
        )
        slot = jnp.take_along_axis(slot, jnp.maximum(mine, 0), axis=0)
        of_assignment = jnp.where(mine >= 0, mine * num_sent + slot, -1)

        slot, _ = _slots(dest_rank_of_all, lax.axis_index(axes))
        source = jnp.maximum(routes.row_source, 0)
        of_row = source // num_sent * num_sent + slot.reshape(-1)[source]
        of_row = jnp.where(routes.row_source >= 0, of_row, -1)
        row = (
            jnp.full(num_ranks * num_sent, -1, jnp.int32)
            .at[jnp.where(of_row >= 0, of_row, num_ranks * num_sent)]
            .set(jnp.arange(layout.capacity, dtype=jnp.int32), mode="drop")
        )
        return cls(assignment, of_assignment.reshape(routes.dest_rank.shape), row, of_row)

    def to_experts(self, sent, axes):
        """Packed rows ``[capacity, ...]`` of ``sent`` ``[R, T*K, ...]``, a row for each slot."""
        received = _exchange(sent, axes)
        return _take(received.reshape(self.row.size, *sent.shape[2:]), self.of_row)

    def to_tokens(self, rows, axes):
        """The row of each assignment ``[T, K, ...]``, of packed ``rows``; zeros where none is."""
        sent = _take(rows, self.row).reshape(*self.assignment.shape, *rows.shape[1:])
        received = _exchange(sent, axes)
        return _take(received.reshape(self.row.size, *rows.shape[1:]), self.of_assignment)


def _slots_along(routes, layout, axes):
    return _Slots.of(routes, lax.all_gather(routes.dest_rank.reshape(-1), axes), layout, axes)


def _moves_rows(layout):
    return layout.num_assignments and layout.capacity


# --- The operations ------------------------------------------------------------------------------


def agree(topk_idx, axes, layout):
    """What follows from the ids of all ranks, before any row moves.

    Returns:
      The routes, the counts of ``dispatch_p``, and int32 ``[R, T*K]``, the ``dest_rank`` of all
      ranks.
    """
    me = lax.axis_index(axes)
    num_ranks, num_sent = layout.num_ranks, layout.num_assignments
    all_ranks, all_rows, load = route(lax.all_gather(topk_idx, axes), layout)
    dest_rank, dest_row = all_ranks[me], all_rows[me]
    all_ranks, all_rows = (a.reshape(num_ranks, num_sent) for a in (all_ranks, all_rows))
    sources = jnp.arange(num_ranks * num_sent, dtype=jnp.int32).reshape(num_ranks, num_sent)
    row = jnp.where(all_ranks == me, all_rows, layout.capacity)
    row_source = jnp.full(layout.capacity, -1, jnp.int32).at[row].set(sources, mode="drop")
    routes = Routes(dest_rank, dest_row, row_source)
    is_invalid = (topk_idx < -1) | (topk_idx >= layout.num_experts)
    num_dropped = jnp.sum(load[me], dtype=jnp.int32) - jnp.sum(row_source >= 0, dtype=jnp.int32)
    counts = (
        layout.group_sizes(load[me]),
        load[me],
        num_dropped,
        jnp.sum(is_invalid, dtype=jnp.int32),
    )
    return routes, counts, all_ranks


def dispatch(topk_idx, *leaves, axes, layout):
    """As ``dispatch_p``. Rows past the end are zero, whatever ``layout.zero_tail`` says."""
    routes, counts, dest_rank_of_all = agree(topk_idx, axes, layout)
    rows = _rows_along(routes, leaves, dest_rank_of_all, axes, layout)
    return [*rows, *routes, *counts]


def _rows_along(routes, leaves, dest_rank_of_all, axes, layout):
    if not _moves_rows(layout):
        return [jnp.zeros((layout.capacity, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    slots = _Slots.of(routes, dest_rank_of_all, layout, axes)
    token = jnp.where(slots.assignment >= 0, slots.assignment // layout.top_k, -1)
    return [slots.to_experts(_take(leaf, token), axes) for leaf in leaves]


def dispatch_along(*operands, axes, layout):
    """As ``dispatch_along_p``."""
    routes, leaves = split_routes(operands)
    dest_rank_of_all = lax.all_gather(routes.dest_rank.reshape(-1), axes)
    return _rows_along(routes, leaves, dest_rank_of_all, axes, layout)


def combine(*operands, axes, layout, hosts: Sequence[int] | jax.Array | None = None):
    """As ``combine_p``.

    Args:
      hosts: which host each rank is on, ``[R]``: 0 for the host of the group's first rank, 1 for
        the next one, and so on. None: all on one.
    """
    routes, (expert_out, *weights) = split_routes(operands)
    dtype, acc_dtype = expert_out.dtype, accumulator_dtype(expert_out.dtype)
    zeros = jnp.zeros((layout.num_tokens, *expert_out.shape[1:]), acc_dtype)
    if not _moves_rows(layout):
        return zeros.astype(dtype)
    terms = _slots_along(routes, layout, axes).to_tokens(expert_out, axes)
    rank = routes.dest_rank
    if hosts is None:
        host = key = rank
    else:
        hosts = jnp.asarray(hosts, jnp.int32)
        host = jnp.where(rank >= 0, hosts[jnp.maximum(rank, 0)], layout.num_ranks)
        key = host * layout.num_ranks + rank
    # Each token's rows in order of (host, rank, k). Assignments without a row come last.
    order = jnp.argsort(jnp.where(rank >= 0, key, layout.num_ranks**2), axis=1, stable=True)
    rank, host = (jnp.take_along_axis(a, order, axis=1) for a in (rank, host))
    terms = jnp.take_along_axis(terms, _column(order, terms), axis=1)
    if weights:
        weights = jnp.take_along_axis(weights[0], order, axis=1)
        # The weight of an assignment without a row may be NaN.
        weights = jnp.where(rank >= 0, weights, 0)

    def rounded(sums):
        return sums.astype(dtype).astype(acc_dtype)

    total = of_host = of_rank = zeros
    for k in range(layout.top_k):
        if k:
            # What has crossed a link is rounded: the sum of a rank, and then that of a host.
            ends = _column(rank[:, k] != rank[:, k - 1], zeros)
            of_host = jnp.where(ends, of_host + rounded(of_rank), of_host)
            of_rank = jnp.where(ends, jnp.zeros((), acc_dtype), of_rank)
            if hosts is not None:
                ends = _column(host[:, k] != host[:, k - 1], zeros)
                total = jnp.where(ends, total + rounded(of_host), total)
                of_host = jnp.where(ends, jnp.zeros((), acc_dtype), of_host)
        row = terms[:, k].astype(acc_dtype)
        of_rank = of_rank + (row * _column(weights[:, k], row) if len(weights) else row)
    of_host = of_host + rounded(of_rank)
    if hosts is None:
        return of_host.astype(dtype)
    # A group of one host has no second sum. That shows in the sign of a zero.
    return jnp.where(jnp.max(hosts) > 0, total + rounded(of_host), of_host).astype(dtype)


def combine_transpose(*operands, axes, layout, rows, weights):
    """As ``combine_transpose_p``."""
    routes, (x, *others) = split_routes(operands)
    others = iter(others)
    expert_out = next(others) if weights else None
    scales = next(others) if rows else None
    acc_dtype = accumulator_dtype(x.dtype)
    results = []
    if not _moves_rows(layout):
        shapes = [((layout.capacity, *x.shape[1:]), x.dtype)] * rows
        shapes += [((layout.num_tokens, layout.top_k), acc_dtype)] * weights
        return [jnp.zeros(*shape) for shape in shapes]
    slots = _slots_along(routes, layout, axes)
    if rows:
        is_used = slots.assignment >= 0
        token = _take(x, jnp.where(is_used, slots.assignment // layout.top_k, -1))
        scale = jnp.where(is_used, scales.reshape(-1)[slots.assignment], 0)
        sent = (_column(scale, token) * token.astype(acc_dtype)).astype(x.dtype)
        results.append(slots.to_experts(sent, axes))
    if weights:
        terms = slots.to_tokens(expert_out, axes).astype(acc_dtype)
        products = terms * x.astype(acc_dtype)[:, None]
        dots = jnp.sum(products, axis=tuple(range(2, products.ndim)))
        results.append(jnp.where(routes.dest_rank >= 0, dots, 0))
    return results
