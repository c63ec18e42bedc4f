"""An exchange on demand: all agree on sizes and addresses first, then rows go to their places.

XLA gathers the ids of all ranks, and each rank computes from them where each row goes. Then one
kernel of this package puts the rows there. Nobody asks for anything any more, but ranks wait for
each other's arrival. On the way back each row goes to its source by itself, and XLA sums a token's
rows. So libraries work that have puts and no exchange. Over NVSHMEM it shows what they would pay.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax import hosts, plain
from freeio_jax.arguments import combine_arguments, dispatch_arguments
from freeio_jax.bench.baselines import sum_rows, vary_alike
from freeio_jax.define import bind
from freeio_jax.handle import Dispatched, Handle, Routes
from freeio_jax.layout import Layout
from freeio_jax.primitives import dispatch_along_p
from freeio_jax.transport import Nvshmem, choose


def dispatch(
    tokens: Any,
    topk_idx: jax.Array,
    *,
    num_experts: int,
    axis_name: str | tuple[str, ...],
    capacity: int | None = None,
    alignment: int = 1,
    zero_tail: bool = True,
) -> Dispatched:
    """As :func:`freeio_jax.dispatch`; the handles are interchangeable."""
    leaves, treedef, topk_idx, layout, axes = dispatch_arguments(
        tokens,
        topk_idx,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity=capacity,
        alignment=alignment,
        zero_tail=zero_tail,
    )
    routes, (group_sizes, *counts), _ = plain.agree(topk_idx, axes, layout)
    rows = bind(dispatch_along_p, *routes, *leaves, axes=axes, layout=layout)
    handle = Handle(*counts, *routes, layout, axes)
    return Dispatched(jax.tree_util.tree_unflatten(treedef, rows), group_sizes, handle)


def combine(
    expert_out: jax.Array, handle: Handle, topk_weights: jax.Array | None = None
) -> jax.Array:
    """As :func:`freeio_jax.combine`, rounding once."""
    expert_out, weights = combine_arguments(expert_out, handle, topk_weights)
    layout, axes = handle._layout, handle._axis_name
    if not layout.num_assignments or not layout.capacity:
        return jnp.zeros((layout.num_tokens, *expert_out.shape[1:]), expert_out.dtype)
    routes, back = _way_back(handle)
    (rows,) = bind(dispatch_along_p, *routes, expert_out, axes=axes, layout=back)
    order = jnp.where(routes.row_source >= 0, lax.iota(jnp.int32, layout.num_assignments), -1)
    inverse = order.reshape(layout.num_tokens, layout.top_k)
    return sum_rows(*vary_alike(rows, weights, order, inverse))


def _way_back(handle: Handle) -> tuple[Routes, Layout]:
    """That of the packed rows, as a dispatch of its own: each has one place, its assignment's."""
    layout = handle._layout
    source, has_row = handle._row_source[:, None], handle.has_row().reshape(-1)
    row = handle._dest_rank.reshape(-1) * layout.capacity + handle._dest_row.reshape(-1)
    routes = Routes(
        dest_rank=jnp.where(source >= 0, source // layout.num_assignments, -1),
        dest_row=jnp.where(source >= 0, source % layout.num_assignments, -1),
        row_source=jnp.where(has_row, row, -1),
    )
    back = Layout(
        layout.num_ranks,
        num_tokens=layout.capacity,
        top_k=1,
        num_experts=layout.num_experts,
        capacity=layout.num_assignments,
    )
    return routes, back


def carrier(devices) -> str:
    """What carries rows between the hosts of these devices; empty: they are on one host."""
    if len(set(hosts.of_devices(list(devices)))) < 2:
        return ""
    return choose("cpu" if devices[0].platform == "cpu" else "cuda").name


def is_at_hand(devices) -> bool:
    """Whether NVSHMEM carries the rows."""
    return carrier(devices) == Nvshmem.name
