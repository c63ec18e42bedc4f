"""``lax.ragged_all_to_all`` by ``all_gather``: XLA has none for CPU."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """As JAX documents it. Sizes that sender and receiver do not agree on give NaN everywhere."""
    me, num_ranks = lax.axis_index(axis_name), lax.axis_size(axis_name)

    def to_me(array):
        """``[source, update]`` of the updates that come here."""
        return lax.all_gather(array, axis_name).reshape(num_ranks, num_ranks, -1)[:, me]

    here, sizes, there = (to_me(a) for a in (input_offsets, send_sizes, output_offsets))
    agreed = jnp.all(sizes.reshape(-1) == recv_sizes)
    there, sizes, here = (a[..., None] for a in (there, sizes, here))
    row = jnp.arange(output.shape[0])
    hit = (row >= there) & (row < there + sizes)
    source = here + row - there + jnp.arange(num_ranks)[:, None, None] * operand.shape[0]
    # -2: two updates of one row, which is not allowed either.
    index = jnp.where(hit.sum((0, 1)) > 1, -2, jnp.where(hit, source, -1).max((0, 1)))
    rows = lax.all_gather(operand, axis_name, tiled=True)[jnp.maximum(index, 0)]
    index = index.reshape((-1,) + (1,) * (output.ndim - 1))
    result = jnp.where(index >= 0, rows, output)
    poison = jnp.asarray(jnp.nan if jnp.issubdtype(output.dtype, jnp.floating) else 85)
    return jnp.where(agreed & (index != -2), result, poison.astype(output.dtype))
