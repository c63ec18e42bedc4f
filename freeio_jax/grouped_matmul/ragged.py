"""The products by a ragged_dot_general, that of jax.lax or of tokamax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax.grouped_matmul.product import Product

_NUMBERS = {
    Product.FORWARD: lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,)),
    Product.ROWS_GRADIENT: lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,)),
    Product.WEIGHTS_GRADIENT: lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ()),
}


def _masked(rows, group_sizes):
    """``rows`` with zeros past the last group: ragged dots may leave or read garbage there."""
    row = jnp.arange(rows.shape[0], dtype=jnp.int32)
    used = jnp.sum(group_sizes, dtype=jnp.int32)
    return jnp.where((row < used)[:, None], rows, jnp.zeros((), rows.dtype))


def _without_unused(weights, group_sizes):
    """``weights`` with zeros for groups without rows: ragged dots may multiply them by zero.

    Then one NaN there would be in every row of the result.
    """
    used = (group_sizes > 0)[:, None, None]
    return jnp.where(used, weights, jnp.zeros((), weights.dtype))


def ragged(
    product: Product, left, right, group_sizes, *, dot=lax.ragged_dot_general, guarded=True
) -> jax.Array:
    """Evaluates ``product`` by ``dot``, which has the interface of lax.ragged_dot_general.

    ``guarded``: whatever ``dot`` does with weights of groups without rows, they reach no result.
    This takes a copy of the weights.
    """
    weights_gradient = product == Product.WEIGHTS_GRADIENT
    if weights_gradient:
        left, right = _masked(left, group_sizes), _masked(right, group_sizes)
    elif guarded:
        right = _without_unused(right, group_sizes)
    out = dot(left, right, group_sizes, _NUMBERS[product], preferred_element_type=left.dtype)
    return out if weights_gradient else _masked(out, group_sizes)


def by_tokamax(product: Product, left, right, group_sizes, *, guarded=True) -> jax.Array:
    """Evaluates ``product`` by tokamax, in the configuration that it chooses itself.

    ``guarded``: as in :func:`ragged`.
    """
    import tokamax

    def dot(left, right, group_sizes, numbers, **options):
        return tokamax.ragged_dot_general(
            left,
            right,
            group_sizes,
            ragged_dot_dimension_numbers=numbers,
            manual_axis_type=jax.typeof(left).mat,
            **options,
        )

    return ragged(product, left, right, group_sizes, dot=dot, guarded=guarded)
