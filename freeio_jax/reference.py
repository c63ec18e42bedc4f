"""The contract in plain ``jax.lax``: the oracle of the tests and the baseline of the benchmark.

Differentiable by JAX itself. ``tests/test_reference.py`` checks it against plain numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from freeio_jax import plain
from freeio_jax.arguments import combine_arguments, dispatch_arguments
from freeio_jax.handle import Dispatched, Handle
from freeio_jax.hosts import in_order_of_rank
from freeio_jax.primitives import split_dispatched


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
    results = plain.dispatch(topk_idx, *leaves, axes=axes, layout=layout)
    rows, routes, counts = split_dispatched(results)
    group_sizes, load, dropped, invalid = counts
    handle = Handle(load, dropped, invalid, *routes, layout, axes)
    return Dispatched(jax.tree_util.tree_unflatten(treedef, rows), group_sizes, handle)


def combine(expert_out, handle, topk_weights=None, *, hosts: Sequence[int] | None = None):
    """As :func:`freeio_jax.combine`, in plain ``jax.lax``.

    Args:
      hosts: which host each of the group's ranks is on, as numbers of any kind; None: all on one.
        It decides where sums are rounded.

    Raises:
      ValueError: ``hosts`` does not have a number for each rank.
    """
    expert_out, weights = combine_arguments(expert_out, handle, topk_weights)
    layout = handle._layout
    if hosts is not None:
        if len(hosts) != layout.num_ranks:
            raise ValueError(
                f"combine: hosts has {len(hosts)} numbers, but the group has {layout.num_ranks} "
                "ranks: pass the number of each rank's host."
            )
        hosts = in_order_of_rank(hosts)
    operands = (expert_out,) if weights is None else (expert_out, weights)
    return plain.combine(
        *handle._routes, *operands, axes=handle._axis_name, layout=layout, hosts=hosts
    )
