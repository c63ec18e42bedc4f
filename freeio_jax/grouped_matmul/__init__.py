"""grouped_matmul: the experts' matrix product, by the fastest implementation that is right.

Which one that is depends on the platform, the product, the dtype and the widths, and is decided
once in a process: :func:`choose` says which and why, ``python -m freeio_jax.info`` prints it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from freeio_jax.grouped_matmul import context, primitive
from freeio_jax.grouped_matmul.choice import choose
from freeio_jax.grouped_matmul.context import use
from freeio_jax.grouped_matmul.product import Product

__all__ = ["Product", "choose", "grouped_matmul", "use"]


def grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiplies each group of rows with its own matrix.

    Args:
      rows: ``[M, K]``, floating: group 0's rows first, then group 1's, ... Rows past
        ``sum(group_sizes)`` are not looked at.
      weights: ``[G, K, N]``, floating.
      group_sizes: int32 ``[G]``, at most M in sum.

    Returns:
      ``[M, N]`` in the common dtype of ``rows`` and ``weights``; rows past ``sum(group_sizes)`` are
      zero. Sums are made in float32 (float64 for float64) and rounded once.

    Raises:
      TypeError, ValueError: an argument's dtype or shape.

    Differentiable in ``rows`` and ``weights`` in both modes, any number of times; the gradient of
    rows past the end is zero. ``vmap`` multiplies one after the other.

    >>> import jax.numpy as jnp
    >>> from freeio_jax.grouped_matmul import grouped_matmul
    >>> rows = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    >>> weights = jnp.array([[[1.0], [0.0]], [[0.0], [10.0]]])
    >>> grouped_matmul(rows, weights, jnp.array([1, 2])).tolist()
    [[1.0], [40.0], [60.0], [0.0]]
    """
    substitute = context.substitute.get()
    if substitute is not None:
        with context.replaced(None):
            return substitute(rows, weights, group_sizes)
    rows, weights, group_sizes = map(jnp.asarray, (rows, weights, group_sizes))
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[1]:
        raise ValueError(
            f"grouped_matmul: rows {rows.shape} and weights {weights.shape} must be [M, K] and "
            "[G, K, N]."
        )
    if group_sizes.shape != weights.shape[:1]:
        raise ValueError(
            f"grouped_matmul: group_sizes has shape {group_sizes.shape}, but weights "
            f"{weights.shape} has {weights.shape[0]} groups: pass one size for each."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"grouped_matmul: group_sizes must be int32, got {group_sizes.dtype}.")
    dtype = jnp.result_type(rows, weights)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"grouped_matmul: rows and weights must be floating, got {rows.dtype} and "
            f"{weights.dtype}."
        )
    return primitive.bind(
        Product.FORWARD,
        rows.astype(dtype),
        weights.astype(dtype),
        group_sizes.astype(jnp.int32),
        by=context.implementation.value,
    )
