"""The products as a loop over tiles of one group's rows, in plain XLA: right on every platform.

It serves on CPU, where XLA lowers lax.ragged_dot to one dense product for each group, over all
rows. float32, 4096 x 256 rows of which a quarter are filled, 8 groups, N = 512, take 158 ms
forward and 550 with gradients on 2 cores (jax 0.10.2); this loop takes 7 and 22. Elsewhere it is
what others are compared with, and what is left where all of them are wrong.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax.dtypes import accumulator_dtype
from freeio_jax.grouped_matmul.product import Product


def tiled(product: Product, left, right, group_sizes, *, tile_rows: int = 64) -> jax.Array:
    """Evaluates ``product``; a step of the loop multiplies ``tile_rows`` rows of one group."""
    return _PRODUCTS[product](left, right, group_sizes, tile_rows)


def _for_each_tile(body, out, group_sizes, num_rows, tile_rows):
    """``out = body(group, start, mask, out)`` for each tile of at most ``tile_rows`` rows.

    A tile is ``rows[start:start + size]``, ``size = min(tile_rows, num_rows)``; ``mask``
    ``[size, 1]`` is true where the row is of this group and of no other tile of it.
    """
    size = min(tile_rows, num_rows)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes
    num_tiles = (group_sizes + size - 1) // size
    last_tile = jnp.cumsum(num_tiles, dtype=jnp.int32)

    def step(tile, out):
        group = jnp.sum(last_tile <= tile, dtype=jnp.int32)
        first = starts[group] + (tile - last_tile[group] + num_tiles[group]) * size
        start = jnp.minimum(first, num_rows - size)
        row = start + jnp.arange(size, dtype=jnp.int32)
        return body(group, start, ((row >= first) & (row < ends[group]))[:, None], out)

    return lax.fori_loop(jnp.zeros((), jnp.int32), last_tile[-1], step, out)


def _multiply(rows, weights, group_sizes, tile_rows, *, transposed):
    num_rows, width = rows.shape[0], weights.shape[1 if transposed else 2]
    out = jnp.zeros((num_rows, width), rows.dtype)
    if not out.size or not weights.size:
        return out

    def body(group, start, mask, out):
        tile = lax.dynamic_slice_in_dim(rows, start, mask.shape[0])
        result = lax.dot_general(
            tile,
            weights[group],
            (((1,), (1 if transposed else 0,)), ((), ())),
            preferred_element_type=accumulator_dtype(rows.dtype),
        )
        before = lax.dynamic_slice_in_dim(out, start, mask.shape[0])
        tile = jnp.where(mask, result.astype(out.dtype), before)
        return lax.dynamic_update_slice_in_dim(out, tile, start, 0)

    return _for_each_tile(body, out, group_sizes, num_rows, tile_rows)


def _outer(rows, cotangents, group_sizes, tile_rows):
    shape = (group_sizes.shape[0], rows.shape[1], cotangents.shape[1])
    acc_dtype = accumulator_dtype(rows.dtype)
    out = jnp.zeros(shape, acc_dtype)
    if not out.size or not rows.shape[0]:
        return out.astype(rows.dtype)

    def body(group, start, mask, out):
        left, right = (
            jnp.where(
                mask, lax.dynamic_slice_in_dim(a, start, mask.shape[0]), jnp.zeros((), a.dtype)
            )
            for a in (rows, cotangents)
        )
        result = lax.dot_general(
            left, right, (((0,), (0,)), ((), ())), preferred_element_type=acc_dtype
        )
        return out.at[group].add(result)

    return _for_each_tile(body, out, group_sizes, rows.shape[0], tile_rows).astype(rows.dtype)


_PRODUCTS = {
    Product.FORWARD: functools.partial(_multiply, transposed=False),
    Product.ROWS_GRADIENT: functools.partial(_multiply, transposed=True),
    Product.WEIGHTS_GRADIENT: _outer,
}
