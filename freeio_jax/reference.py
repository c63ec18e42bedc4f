"""The contract in plain ``jax.lax``: the oracle of the tests and the baseline of the benchmark.

The exchange that everyone writes today: rows are gathered into one fixed-size slot per
(destination, assignment), sent with a dense ``lax.all_to_all``, and gathered again into packed
order. Differentiable by JAX itself. ``tests/test_reference.py`` checks it against plain numpy.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax.arguments import combine_arguments, dispatch_arguments
from freeio_jax.dtypes import accumulator_dtype
from freeio_jax.handle import Dispatched, Handle
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


def _slots(dest_rank, rank):
    """Slot of each assignment in the buffer between its source and ``rank``: order of (t, k)."""
    to_rank = dest_rank == rank
    return jnp.cumsum(to_rank, axis=-1, dtype=jnp.int32) - 1, to_rank


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
        mask = (index >= 0).reshape(index.shape + (1,) * (taken.ndim - index.ndim))
        return jnp.where(mask, taken, jnp.zeros((), rows.dtype))

    return _by_bits(take, rows, index)


def dispatch(
    tokens, topk_idx, *, num_experts, axis_name, capacity=None, alignment=1, zero_tail=True
) -> Dispatched:
    """As :func:`freeio_jax.dispatch`, in plain ``jax.lax``; the handles are interchangeable.

    With ``zero_tail=False``, too, the rows past the end are zero here.
    """
    leaves, treedef, topk_idx, layout, axes = dispatch_arguments(
        tokens,
        topk_idx,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity=capacity,
        alignment=alignment,
        zero_tail=zero_tail,
    )
    me = lax.axis_index(axes)
    num_ranks, num_sent = layout.num_ranks, layout.num_assignments
    dest_rank, dest_row, load = route(lax.all_gather(topk_idx, axes), layout)
    dest_rank, dest_row = (a.reshape(num_ranks, num_sent) for a in (dest_rank, dest_row))

    # Source side: one slot per assignment in the buffer to each rank.
    ranks = jnp.arange(num_ranks, dtype=jnp.int32)[:, None]
    slot, to_rank = _slots(dest_rank[me][None], ranks)
    assignment = jnp.broadcast_to(jnp.arange(num_sent, dtype=jnp.int32), slot.shape)
    in_slot = (
        jnp.full((num_ranks, num_sent), -1, jnp.int32)
        .at[ranks, jnp.where(to_rank, slot, num_sent)]
        .set(assignment, mode="drop")
    )

    # Expert side: each row's source, and the slot in which it arrives.
    slot, to_me = _slots(dest_rank, me)
    sources = jnp.arange(num_ranks * num_sent, dtype=jnp.int32).reshape(num_ranks, num_sent)
    row = jnp.where(to_me, dest_row, layout.capacity)
    row_source = jnp.full(layout.capacity, -1, jnp.int32).at[row].set(sources, mode="drop")
    arrival = (
        jnp.full(layout.capacity, -1, jnp.int32).at[row].set(ranks * num_sent + slot, mode="drop")
    )

    def exchange(leaf):
        if not num_sent:
            return jnp.zeros((layout.capacity, *leaf.shape[1:]), leaf.dtype)
        sent = _take(leaf, jnp.where(in_slot >= 0, in_slot // layout.top_k, -1))
        received = _exchange(sent, axes).reshape(num_ranks * num_sent, *leaf.shape[1:])
        return _take(received, arrival)

    valid = (topk_idx >= -1) & (topk_idx < num_experts)
    handle = Handle(
        expert_load=load[me],
        num_dropped=(jnp.sum(load[me]) - jnp.sum(row_source >= 0)).astype(jnp.int32),
        num_invalid=jnp.sum(~valid, dtype=jnp.int32),
        _dest_rank=dest_rank[me].reshape(topk_idx.shape),
        _dest_row=dest_row[me].reshape(topk_idx.shape),
        _row_source=row_source,
        _layout=layout,
        _axis_name=axes,
    )
    rows = jax.tree_util.tree_unflatten(treedef, [exchange(leaf) for leaf in leaves])
    return Dispatched(rows, layout.group_sizes(load[me]), handle)


def combine(expert_out, handle, topk_weights=None):
    """As :func:`freeio_jax.combine`, in plain ``jax.lax``."""
    expert_out, weights = combine_arguments(expert_out, handle, topk_weights)
    layout, axes = handle._layout, handle._axis_name
    num_ranks, num_sent = layout.num_ranks, layout.num_assignments
    dtype, acc_dtype = expert_out.dtype, accumulator_dtype(expert_out.dtype)
    features = expert_out.shape[1:]
    me = lax.axis_index(axes)

    # Expert side: rows go back in the slots in which they came.
    dest_rank = lax.all_gather(handle._dest_rank.reshape(-1), axes)
    slot, _ = _slots(dest_rank, me)
    source = jnp.maximum(handle._row_source, 0)
    row_slot = slot.reshape(-1)[source] if num_sent else source
    back = jnp.where(handle._row_source >= 0, source // max(num_sent, 1) * num_sent + row_slot, -1)
    row_in_slot = (
        jnp.full(num_ranks * num_sent, -1, jnp.int32)
        .at[jnp.where(back >= 0, back, num_ranks * num_sent)]
        .set(jnp.arange(layout.capacity, dtype=jnp.int32), mode="drop")
    )
    if not layout.capacity or not num_sent:
        return jnp.zeros((layout.num_tokens, *features), dtype)
    sent = _take(expert_out, row_in_slot).reshape(num_ranks, num_sent, *features)
    received = _exchange(sent, axes).reshape(num_ranks * num_sent, *features)

    # Source side: each token's rows in order of (rank, k); a rank's partial sum is rounded to the
    # dtype that crosses the link before the partials are added.
    my_ranks = handle._dest_rank
    mine = jnp.take_along_axis(
        _slots(my_ranks.reshape(1, -1), jnp.arange(num_ranks, dtype=jnp.int32)[:, None])[0],
        jnp.maximum(my_ranks.reshape(1, -1), 0),
        axis=0,
    ).reshape(my_ranks.shape)
    index = jnp.where(my_ranks >= 0, my_ranks * num_sent + mine, -1)
    order = jnp.argsort(jnp.where(my_ranks >= 0, my_ranks, num_ranks), axis=1, stable=True)
    index, rank = (jnp.take_along_axis(a, order, axis=1) for a in (index, my_ranks))
    if weights is not None:
        weights = jnp.take_along_axis(weights, order, axis=1)

    def column(mask):
        return mask.reshape(mask.shape + (1,) * len(features))

    total = partial = jnp.zeros((layout.num_tokens, *features), acc_dtype)
    for k in range(layout.top_k):
        if k:
            done = column(rank[:, k] != rank[:, k - 1])
            total = jnp.where(done, total + partial.astype(dtype).astype(acc_dtype), total)
            partial = jnp.where(done, jnp.zeros((), acc_dtype), partial)
        row = _take(received, index[:, k]).astype(acc_dtype)
        if weights is not None:
            # Select the weight before multiplying: the one of a skipped id may be NaN.
            row = row * column(jnp.where(index[:, k] >= 0, weights[:, k], 0))
        partial = partial + row
    return (total + partial.astype(dtype).astype(acc_dtype)).astype(dtype)
